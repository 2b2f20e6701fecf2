// The words of the prompt that a region can belong to, concepts first. `likely` are those that name a thing: what stands before a word that
// names none, before a mark, or at the end. The prompt comes from the page (see tabs/layout.py), so that it needs no server.
const PLAIN = new Set(('a an the of and or in on at with without by to for from into onto under over near next beside behind above below is are ' +
  'his her its their my your our this that these those photo photograph picture image painting drawing').split(' '));

function choicesOf(prompt) {
  const words = prompt.match(/<[^<>\s]+>|[\p{L}\p{N}_]+(?:['’-][\p{L}\p{N}_]+)*|[^\p{L}\p{N}_\s]/gu) || [];
  const plain = words.map((word) => word.toLowerCase());
  const isWord = (word) => /[\p{L}\p{N}]/u.test(word || '');
  const found = [];
  words.forEach((word, at) => {
    if (PLAIN.has(plain[at]) || !isWord(word)) return;
    const likely = word.startsWith('<') || PLAIN.has(plain[at + 1]) || !isWord(words[at + 1]);
    const same = plain.filter((one) => one === plain[at]).length, number = plain.slice(0, at).filter((one) => one === plain[at]).length;
    if (same === 1) return found.push({words: word, occurrence: null, title: word, likely});
    found.push({words: word, occurrence: number, title: word + ', number ' + (number + 1), likely});
    if (number === same - 1) found.push({words: word, occurrence: null, title: word + ', every one', likely: false});
  });
  return [...found.filter((one) => one.words.startsWith('<')), ...found.filter((one) => !one.words.startsWith('<'))];
}
