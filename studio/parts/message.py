"""What a tab answers in place, under the button that was pressed; and how handlers' errors reach a person."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from html import escape
from types import TracebackType
from typing import Any

import gradio as gr

from pipelines import StudioError

log = logging.getLogger(__name__)


def done(text: str) -> str:
    """Markup for something that worked."""
    return f'<p class="message done" role="status">{escape(text)}</p>'


def problem(text: str) -> str:
    """Markup for something the person can put right."""
    return f'<p class="message problem" role="alert">{escape(text)}</p>'


class reported(AbstractContextManager[None]):
    """Writes an unexpected exception to the log and raises it again as a short text for the page."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, (StudioError, gr.Error)):
            return
        log.error("A handler failed", exc_info=error)
        text = f"This is a bug in Attune ({type(error).__name__}). Details are in attune.log in the workspace."
        raise gr.Error(escape(text), print_exception=False) from error


def answering(outputs: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For handlers of `outputs` components and, last, a message: a StudioError leaves them alone and goes there."""

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def answer(*args: Any, **kwargs: Any) -> Any:
            try:
                with reported():
                    return handler(*args, **kwargs)
            except StudioError as error:
                return (*(gr.skip() for _ in range(outputs)), problem(str(error)))

        return answer

    return decorate
