// Keeps the page up to date, and adds small comforts. Every page can be read, and every button works, without it.
//
// The server says over an event stream that what is shown was looked at again; then this asks for the page anew and takes over
// what differs. Nothing from a task is ever made into markup here: the server has escaped it, and nodes are copied one by one.
"use strict";
(() => {
  const PAUSE = 2000; // ms between two refreshes at least
  const mark = document.getElementById("live");
  const topic = document.body.dataset.topic;
  let source = null;
  let timer = 0;
  let last = 0;
  let busy = false;

  function say(word, kind) {
    mark.textContent = word;
    mark.className = "live " + kind;
  }

  // ---------------------------------------------------------------- taking over what differs

  function sameKind(a, b) {
    return a.nodeType === b.nodeType && a.nodeName === b.nodeName && (a.id || "") === (b.id || "");
  }

  function takeOver(old, fresh) {
    if (old.nodeType === Node.TEXT_NODE) {
      if (old.data !== fresh.data) old.data = fresh.data;
      return;
    }
    if (old.nodeType !== Node.ELEMENT_NODE) return;
    // what a person has typed, opened or scrolled stays; a hidden field is not theirs, but says what the button beside it does
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
      if ([...old.options].some((each) => each.value === chosen)) old.value = chosen;
      return;
    }
    children(old, fresh);
  }

  function children(old, fresh) {
    const before = [...old.childNodes];
    const after = [...fresh.childNodes];
    let at = 0;
    for (const node of after) {
      const here = before[at];
      if (here && sameKind(here, node)) {
        takeOver(here, node);
        at += 1;
      } else if (here && node.id && before.slice(at).some((each) => sameKind(each, node))) {
        const there = before.findIndex((each, index) => index >= at && sameKind(each, node));
        old.insertBefore(before[there], here);
        before.splice(at, 0, before.splice(there, 1)[0]);
        takeOver(before[at], node);
        at += 1;
      } else {
        old.insertBefore(document.importNode(node, true), here ?? null);
      }
    }
    for (const node of before.slice(at)) node.remove();
  }

  async function refresh() {
    if (busy) return;
    busy = true;
    last = Date.now();
    try {
      const answer = await fetch(location.href, { headers: { "x-live": "1" }, redirect: "manual", cache: "no-store" });
      if (answer.ok) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        children(document.getElementById("main"), fresh.getElementById("main"));
        localTimes();
        say("live", "on");
      } else if (answer.type === "opaqueredirect" || answer.status === 401) {
        location.reload();
      } else {
        say("not current", "off");
      }
    } catch {
      say("not connected", "off");
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
    if (!topic || source || document.hidden) return;
    source = new EventSource("/events?topic=" + encodeURIComponent(topic));
    source.onopen = () => say("live", "on");
    source.onmessage = soon;
    source.onerror = () => say("not connected", "off");
  }

  function rest() {
    source?.close();
    source = null;
  }

  // a page that nobody sees asks for nothing
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

  // ---------------------------------------------------------------- comforts

  function localTimes() {
    for (const each of document.querySelectorAll("time")) {
      const at = new Date(each.dateTime);
      const two = (number, wide = 2) => String(number).padStart(wide, "0");
      const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
      const text = `${day} ${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}.${two(at.getMilliseconds(), 3)}`;
      if (each.dataset.show === "whole") {
        if (each.textContent !== text) each.textContent = text;
        each.title = each.dateTime.replace("T", " ").replace("Z", " UTC");
      } else {
        each.title = text;
      }
    }
  }

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
      // no storage in this browser: the choice holds for this page
    }
  });

  // a slash goes to the search, as in many tools
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    const field = document.querySelector('input[type="search"]');
    if (field) {
      event.preventDefault();
      field.focus();
    }
  });

  // on a phone the row of pages is longer than the screen
  document.querySelector("header nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
  localTimes();
  follow();
})();
