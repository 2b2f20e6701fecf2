// The words of the prompt that a region can belong to, concepts first, and pairs of neighbours ("pet cat") after the word that they end in.
// `likely` are those that name a thing: what stands before a word that names none, before a mark, or at the end. The prompt comes from the page
// (see tabs/layout.py), so that it needs no server.
const PLAIN = new Set(('a an the of and or in on at with without by to for from into onto under over near next beside behind above below is are ' +
  'his her its their my your our this that these those photo photograph picture image painting drawing').split(' '));

function choicesOf(prompt) {
  const words = prompt.match(/<[^<>\s]+>|[\p{L}\p{N}_]+(?:['’-][\p{L}\p{N}_]+)*|[^\p{L}\p{N}_\s]/gu) || [];
  const plain = words.map((word) => word.toLowerCase());
  const isWord = (word) => /[\p{L}\p{N}]/u.test(word || ''), isConcept = (word) => word.startsWith('<');
  const says = (at) => isWord(words[at]) && !PLAIN.has(plain[at]);
  const found = [];
  const offer = (first, last, likely) => {
    const said = words.slice(first, last + 1).join(' ');
    const places = words.map((_, at) => at).filter((at) => plain.slice(at, at + last - first + 1).join(' ') === said.toLowerCase());
    const number = places.indexOf(first);
    if (places.length === 1) return found.push({words: said, occurrence: null, title: said, likely});
    found.push({words: said, occurrence: number, title: said + ', number ' + (number + 1), likely});
    if (number === places.length - 1) found.push({words: said, occurrence: null, title: said + ', every one', likely: false});
  };
  words.forEach((word, at) => {
    if (!says(at)) return;
    const likely = isConcept(word) || PLAIN.has(plain[at + 1]) || !isWord(words[at + 1]);
    offer(at, at, likely);
    if (likely && says(at - 1) && !isConcept(word) && !isConcept(words[at - 1])) offer(at - 1, at, false);
  });
  return [...found.filter((one) => isConcept(one.words)), ...found.filter((one) => !isConcept(one.words))];
}

// How a choice that isn't among those is called: it may be a phrase of the prompt all the same.
function titleOf({words, occurrence}, prompt) {
  if (!words.trim()) return 'choose a word';
  const parts = words.trim().split(/\s+/).map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'));
  const [before, after] = ['(?<![\\p{L}\\p{N}])', '(?![\\p{L}\\p{N}])'].map((edge, at) => (/[\p{L}\p{N}]/u.test(words.trim().at(-at)) ? edge : ''));
  const count = (prompt.match(new RegExp(before + parts.join('\\s+') + after, 'giu')) || []).length;
  const number = occurrence === null ? '' : ', number ' + (occurrence + 1);
  return words + number + (count > (occurrence || 0) ? '' : ' – not in the prompt');
}
