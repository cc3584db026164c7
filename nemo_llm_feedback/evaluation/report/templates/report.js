"use strict";
(() => {
  const list = document.getElementById("cards");
  if (!list) return;
  const field = (id) => document.getElementById(id);
  const cards = Array.from(list.children);
  const texts = new Map();
  const words = (card) => {
    if (!texts.has(card)) texts.set(card, card.textContent.toLowerCase().replace(/\s+/g, " "));
    return texts.get(card);
  };
  const number = (key) => (a, b) => Number(b.dataset[key]) - Number(a.dataset[key]);
  const orders = {
    change: number("change"),
    "gain-down": number("gain"),
    "gain-up": (a, b) => number("gain")(b, a),
    errors: number("errors"),
    duration: number("duration"),
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name, undefined, { numeric: true }),
  };
  const page = 40;
  let limit = page;
  const update = () => {
    const query = field("search").value.toLowerCase().trim();
    const show = field("show").value;
    const set = field("set") ? field("set").value : "";
    const found = cards.filter(
      (card) =>
        (!show || card.dataset.flags.split(" ").includes(show)) &&
        (!set || card.dataset.set === set) &&
        (!query || words(card).includes(query)),
    );
    found.sort(orders[field("order").value]);
    const visible = new Set(found.slice(0, limit));
    for (const card of cards) card.hidden = !visible.has(card);
    list.append(...found);
    field("count").textContent = `${visible.size} of ${found.length} utterances`;
    field("more").hidden = visible.size === found.length;
  };
  const reveal = () => {
    const card = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!card || !card.classList.contains("card")) return;
    card.hidden = false;
    card.scrollIntoView();
  };
  field("controls").hidden = false;
  field("controls").addEventListener("submit", (event) => event.preventDefault());
  field("controls").addEventListener("input", () => {
    limit = page;
    update();
  });
  field("more").addEventListener("click", () => {
    limit += page;
    update();
  });
  window.addEventListener("hashchange", reveal);
  update();
  reveal();
})();
