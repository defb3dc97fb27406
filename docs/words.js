// In code, a word such as --data or llama-2-7b does not break at its hyphens.
// In tables, a long name such as train.gradient_checkpointing may break at dots, slashes and underscores.
const longest = matchMedia("(max-width: 44.99em)").matches ? 13 : 24;
for (const code of document.querySelectorAll("article code")) {
  const walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode);
  for (const text of texts) text.replaceWith(...pieces(text.data, code.closest("td, th")));
}

function pieces(text, inTable) {
  const parts = text.split(/((?<![\w-])-{0,2}\w+(?:-\w+)+(?!\w)|(?<![\w-])--?\w+)/);
  return parts.flatMap((part, i) => {
    if (i % 2 && (part.startsWith("-") || part.length <= longest)) return word(part);
    return inTable ? part.split(/([\w./=[\]]{14,})/).flatMap((name, j) => (j % 2 ? breakable(name) : name)) : part;
  });
}

function breakable(name) {
  return name.split(/(?<=[\w\]][._/=])(?=\w)/).flatMap((part) => [part, document.createElement("wbr")]).slice(0, -1);
}

function word(text) {
  const span = document.createElement("span");
  span.className = "word";
  span.textContent = text;
  return span;
}
