"use strict";
const root = document.documentElement;
root.classList.add("js"); // before anything is drawn, so that nothing moves later

function pressOne(buttons, chosen) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen));
}

/** The button names the theme that it gives, not the one that is shown. */
function themeButton(button) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => { button.textContent = isDark() ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  system.addEventListener("change", show);
  show();
}

/** Shows the items that fit gallery, class and text; returns those shown at any time. */
function filteredGallery(items) {
  const chips = [...document.querySelectorAll(".chip")];
  const ofClass = document.getElementById("class-filter");
  const verdict = document.getElementById("verdict-filter"); // null if no label is known
  const text = document.getElementById("text-filter");
  let gallery = chips[0].dataset.gallery;

  /** What the page shows of its names, and behind it the names themselves where they hold what no page shows. */
  const names = new Map(
    items.map((item) => [item, `${item.dataset.text}\n${decodeURIComponent(item.dataset.raw ?? "")}`.toLowerCase()]),
  );

  function fits(item) {
    const inGallery = !gallery || item.dataset.galleries.split(" ").includes(gallery);
    const inClass = !ofClass.value || item.dataset.class === ofClass.value;
    const inVerdict = !verdict?.value || item.dataset.verdict === verdict.value;
    return inGallery && inClass && inVerdict && names.get(item).includes(text.value.trim().toLowerCase());
  }

  function show() {
    for (const item of items) item.hidden = !fits(item);
    const count = items.filter((item) => !item.hidden).length;
    document.getElementById("shown").textContent = `${count} of ${items.length} maps.`;
    document.querySelector(".empty").hidden = count > 0;
    for (const meaning of document.querySelectorAll("[data-meaning]")) {
      meaning.classList.toggle("chosen", meaning.dataset.meaning === gallery);
    }
  }

  for (const chip of chips) {
    chip.addEventListener("click", () => {
      gallery = chip.dataset.gallery;
      pressOne(chips, chip);
      show();
    });
  }
  ofClass.addEventListener("change", show);
  verdict?.addEventListener("change", show);
  text.addEventListener("input", show);
  show();
  return () => items.filter((item) => !item.hidden);
}

/** The dialog; returns a function that opens it on one of a list of items. */
function zoomDialog() {
  const dialog = document.getElementById("zoom");
  const sides = dialog.querySelector(".sides");
  const facts = dialog.querySelector(".zoom-facts");
  const views = [...dialog.querySelectorAll("[data-view]")];
  let list = [];
  let place = 0;
  let view = "overlay";

  function choose(name) {
    view = name;
    pressOne(views, views.find((button) => button.dataset.view === name));
    for (const side of sides.children) {
      side.classList.toggle("chosen", side.dataset.side === name);
      side.setAttribute("aria-hidden", String(side.dataset.side !== name));
    }
  }

  function show() {
    const item = list[place];
    const body = item.querySelector("template").content.cloneNode(true);
    body.querySelector("[data-side=overlay]").src = item.querySelector("button img").src;
    sides.replaceChildren(...body.querySelectorAll("img"));
    facts.replaceChildren(body.querySelector("dl"));
    document.getElementById("zoom-title").textContent = item.querySelector(".caption").textContent;
    document.getElementById("zoom-count").textContent = `${place + 1} of ${list.length}.`;
    choose(view);
  }

  function step(by) {
    place = (place + by + list.length) % list.length;
    show();
  }

  document.getElementById("zoom-before").addEventListener("click", () => step(-1));
  document.getElementById("zoom-after").addEventListener("click", () => step(1));
  document.getElementById("zoom-close").addEventListener("click", () => dialog.close());
  for (const button of views) button.addEventListener("click", () => choose(button.dataset.view));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    step(by);
  });
  dialog.addEventListener("close", () => {
    const button = list[place].querySelector("button");
    if (button.checkVisibility()) button.focus();
  });
  return (items, first) => {
    list = items;
    place = items.indexOf(first);
    show();
    dialog.showModal();
  };
}

/** Links of findings to their maps: small pictures that open the dialog. */
function peek(link, open) {
  const ofLink = (one) => document.getElementById(`map-${one.dataset.map}`);
  const picture = new Image();
  picture.src = ofLink(link).querySelector("img").src;
  picture.alt = link.textContent;
  link.replaceChildren(picture);
  link.addEventListener("click", (event) => {
    event.preventDefault();
    const all = [...link.closest(".peeks").querySelectorAll(".peek")].map(ofLink);
    open(all, ofLink(link));
  });
}

document.addEventListener("DOMContentLoaded", () => {
  themeButton(document.getElementById("theme"));
  const items = [...document.querySelectorAll(".item")];
  if (items.length) {
    const shown = filteredGallery(items);
    const open = zoomDialog();
    for (const item of items) {
      item.querySelector("button").addEventListener("click", () => open(shown(), item));
    }
    for (const link of document.querySelectorAll(".peek")) peek(link, open);
  }
  root.classList.add("ready");
});
