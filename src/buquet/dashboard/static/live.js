// Keeps the page up to date, and adds conveniences. Without this script, every page can be read and every button works.
//
// The server reports news over an event stream. The script then loads the page again and copies what differs. It never turns
// text of a task into markup: the server has escaped the text, and nodes are copied one by one.
"use strict";
(() => {
  const PAUSE = 2000; // least time between two refreshes, ms
  const OLD = 10; // seconds after which the page is marked as old, and as too old
  const TOO_OLD = 30;
  const mark = document.getElementById("live");
  const button = document.getElementById("pause");
  const topic = document.body.dataset.topic;
  let source = null;
  let timer = 0;
  let last = 0;
  let busy = false;
  let paused = false;
  let pressed = false; // a pointer is down, and nothing may move under it
  let trouble = "";
  let asOf = 0; // time of the page's data by the server's clock, ms
  let ahead = 0; // how far the server's clock is ahead of the browser's, ms

  // ---------------------------------------------------------------- the age of the page

  const two = (number, wide = 2) => String(number).padStart(wide, "0");
  const time = (at) => `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  const day = (at) => `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  const zone = (at) =>
    new Intl.DateTimeFormat(undefined, { timeZoneName: "short" }).formatToParts(at).find((part) => part.type === "timeZoneName").value;

  function read(page) {
    asOf = Number(page.dataset.asOf);
    ahead = Number(page.dataset.now) - Date.now();
    age();
  }

  function age() {
    const seconds = asOf ? (Date.now() + ahead - asOf) / 1000 : OLD;
    const said = asOf ? `as of ${time(new Date(asOf))}` : "not read yet";
    const text = [paused ? "paused" : trouble, said].filter(Boolean).join(", ");
    if (mark.textContent !== text) mark.textContent = text;
    mark.className = `live ${seconds >= TOO_OLD ? "off" : seconds >= OLD ? "old" : "on"}`;
    if (asOf) mark.title = `Everything on this page is from ${day(new Date(asOf))} ${time(new Date(asOf))} ${zone(new Date(asOf))} or later`;
  }

  function say(what) {
    trouble = what;
    age();
  }

  // ---------------------------------------------------------------- copying what differs

  const keyOf = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.id || node.dataset.key || "" : "");
  const sameKind = (a, b) => a.nodeType === b.nodeType && a.nodeName === b.nodeName;

  function copy(old, fresh) {
    if (old.nodeType === Node.TEXT_NODE) {
      if (old.data !== fresh.data) old.data = fresh.data;
      return;
    }
    if (old.nodeType !== Node.ELEMENT_NODE) return;
    // keep what a person has typed, opened or scrolled; a hidden field belongs to the button beside it, and is copied
    const typed = old.matches("input:not([type=hidden]), select, textarea");
    const own = typed ? ["value", "checked"] : old.matches("details") ? ["open"] : [];
    for (const { name, value } of [...fresh.attributes]) {
      if (!own.includes(name) && old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    for (const { name } of [...old.attributes]) {
      if (!own.includes(name) && !fresh.hasAttribute(name)) old.removeAttribute(name);
    }
    if (old.matches("datalist, input, textarea")) return;
    if (old.matches("select")) {
      if (old.innerHTML === fresh.innerHTML) return;
      const chosen = old.value;
      children(old, fresh);
      if ([...old.options].some((option) => option.value === chosen)) old.value = chosen;
      return;
    }
    children(old, fresh);
  }

  // A node with a key keeps its identity when it moves. Nodes without keys are matched by order.
  function children(old, fresh) {
    const keyed = new Map();
    const loose = [];
    for (const node of old.childNodes) {
      const key = keyOf(node);
      if (key && !keyed.has(key)) keyed.set(key, node);
      else if (!key) loose.push(node);
    }
    const pairs = [...fresh.childNodes].map((node) => {
      const key = keyOf(node);
      if (key) {
        const known = keyed.get(key);
        keyed.delete(key);
        return [node, known && sameKind(known, node) ? known : null];
      }
      const at = loose.findIndex((other) => sameKind(other, node));
      return [node, at < 0 ? null : loose.splice(0, at + 1)[at]];
    });
    const stay = new Set(pairs.map(([, known]) => known));
    for (const node of [...old.childNodes]) if (!stay.has(node)) node.remove();
    let here = old.firstChild;
    for (const [node, known] of pairs) {
      if (known && known === here) here = here.nextSibling;
      else old.insertBefore(known ?? document.importNode(node, true), here);
      if (known) copy(known, node);
    }
  }

  async function refresh() {
    if (busy || paused || pressed) return;
    busy = true;
    last = Date.now();
    try {
      const answer = await fetch(location.href, { headers: { "x-live": "1" }, redirect: "manual", cache: "no-store" });
      if (answer.ok) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        if (paused || pressed) return;
        const focus = document.activeElement;
        children(document.getElementById("main"), fresh.getElementById("main"));
        // moving a node removes its focus
        if (focus !== document.activeElement && focus.isConnected) focus.focus({ preventScroll: true });
        localTimes();
        edges();
        trouble = "";
        read(fresh.getElementById("live"));
      } else if (answer.type === "opaqueredirect" || answer.status === 401) {
        location.reload();
      } else {
        say(`not current (${answer.status})`);
      }
    } catch {
      say("not connected");
    } finally {
      busy = false;
    }
  }

  function soon() {
    if (timer) return;
    timer = setTimeout(() => {
      timer = 0;
      refresh();
    }, Math.max(last + PAUSE - Date.now(), 0));
  }

  function follow() {
    if (!topic || source || paused || document.hidden) return;
    source = new EventSource("/events?topic=" + encodeURIComponent(topic));
    source.onopen = () => say("");
    source.onmessage = soon;
    source.onerror = () => say("not connected");
  }

  function rest() {
    source?.close();
    source = null;
  }

  // a hidden page sends no requests
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      rest();
    } else if (topic) {
      refresh();
      follow();
    }
  });
  addEventListener("pagehide", rest);
  addEventListener("pageshow", follow);

  // nothing moves while a button is pressed
  addEventListener("pointerdown", () => (pressed = true));
  for (const name of ["pointerup", "pointercancel", "blur"]) {
    addEventListener(name, () => {
      if (pressed && topic) soon();
      pressed = false;
    });
  }

  button.hidden = !topic;
  button.addEventListener("click", () => {
    paused = !paused;
    button.textContent = paused ? "▶" : "❚❚";
    button.title = paused ? "Update this page again" : "Stop updating this page";
    button.setAttribute("aria-label", button.title);
    if (paused) rest();
    else {
      refresh();
      follow();
    }
    age();
  });

  // ---------------------------------------------------------------- conveniences

  function localTimes() {
    for (const element of document.querySelectorAll("time")) {
      if (element.closest("#live")) continue;
      const at = new Date(element.dateTime);
      const text = `${day(at)} ${time(at)}.${two(at.getMilliseconds(), 3)} ${zone(at)}`;
      if (element.dataset.show === "whole") {
        if (element.textContent !== text) element.textContent = text;
        element.title = element.dateTime.replace("T", " ").replace("Z", " UTC");
      } else {
        element.title = text;
      }
    }
  }

  // mark tables and drawings that continue beyond the edge
  function edges() {
    for (const element of document.querySelectorAll(".wide")) {
      element.classList.toggle("more", element.scrollLeft + element.clientWidth < element.scrollWidth - 2);
    }
  }
  document.addEventListener("scroll", edges, true);
  addEventListener("resize", edges);

  document.addEventListener("submit", (event) => {
    const asks = event.target.dataset.confirm;
    if (asks && !confirm(asks)) event.preventDefault();
  });

  const theme = document.getElementById("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try {
      localStorage.setItem("buquet-theme", root.dataset.theme);
    } catch {
      // without storage, the choice holds for this page only
    }
  });

  // a slash focuses the search field
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    const field = document.querySelector('input[type="search"]');
    if (field) {
      event.preventDefault();
      field.focus();
    }
  });

  localTimes();
  edges();
  if (mark) {
    read(mark);
    setInterval(age, 1000);
  }
  follow();
})();
