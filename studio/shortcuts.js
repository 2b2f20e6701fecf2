// Ctrl+Enter presses the visible tab's main button; Esc presses Stop. Keys that a field or a dialog already used are left alone.
document.addEventListener("keydown", (event) => {
  const press = (selector) => {
    const button = [...document.querySelectorAll(selector)].find((found) => found.offsetParent !== null && !found.disabled);
    if (button) button.click();
    return Boolean(button);
  };
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    if (press("#generate-button") || press("#train-button")) event.preventDefault();
  } else if (event.key === "Escape" && !event.defaultPrevented) {
    const open = document.querySelector("[role=listbox], .preview, dialog[open]");
    const writing = event.target instanceof Element && event.target.matches("input[role=listbox], select");
    if (!open && !writing) press("#jobs .job.running button.halt");
  }
});
