// Keeps the page as it would be if it were loaded now.  /status is asked, cheaply; when it says something new
// the page is fetched and what differs of it is put in.  Markup is never made here: the server escaped it, and
// what DOMParser reads does not run.
"use strict";
(() => {
  const POLL = 2000, SLOWEST = 60000, FAILED_AT_MOST = 30000, ANSWERED_IN = 15000, SAID_EVERY = 10000;
  const stale = document.getElementById("stale"), said = document.getElementById("said");
  const sources = new WeakMap(); // nodes, as the server wrote them
  let etag = document.documentElement.dataset.status, polling = false, timer = 0, wait = POLL;
  let ahead = 0, saidAt = 0, goodAt = Date.now();

  const remember = (root) => {
    for (const node of root.querySelectorAll("[data-live], [data-live] > *")) sources.set(node, node.outerHTML);
  };

  // The children of `old` become those of `fresh`; what has not changed stays the node that it was, so that
  // images are not loaded again and the focus stays.
  const merge = (old, fresh) => {
    if (sources.get(old) === fresh.outerHTML) return;
    sources.set(old, fresh.outerHTML);
    if (!fresh.firstElementChild) {
      old.textContent = fresh.textContent;
      return;
    }
    const there = new Map([...old.children].map((node) => [sources.get(node), node]));
    let at = old.firstElementChild;
    for (const child of fresh.children) {
      const node = there.get(child.outerHTML) || document.importNode(child, true);
      there.delete(child.outerHTML);
      if (node === at) {
        at = at.nextElementSibling;
        continue;
      }
      sources.set(node, child.outerHTML);
      old.insertBefore(node, at);
    }
    while (at) {
      const next = at.nextElementSibling;
      at.remove();
      at = next;
    }
  };

  const keys = () => new Set([...document.querySelectorAll("#studies > .study")].map((node) => node.dataset.key));

  const ask = async (place, headers) => {
    const answer = await fetch(place, { headers, cache: "no-store", signal: AbortSignal.timeout(ANSWERED_IN) });
    if (!answer.ok && answer.status !== 304) throw new Error(answer.status);
    return answer;
  };

  const renew = async () => {
    const answer = await ask("./", {});
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const before = keys();
    for (const old of document.querySelectorAll("[data-live]")) {
      const other = fresh.getElementById(old.id);
      if (other) merge(old, other);
    }
    const more = [...keys()].filter((key) => !before.has(key)).length;
    if (more && Date.now() - saidAt > SAID_EVERY) {
      saidAt = Date.now();
      said.textContent = more === 1 ? "One more study" : `${more} more studies`;
    }
    tick();
  };

  const ago = (seconds) => {
    if (seconds < 2) return "now";
    if (seconds < 100) return `${Math.round(seconds)} s ago`;
    if (seconds < 6000) return `${Math.round(seconds / 60)} min ago`;
    if (seconds < 172800) return `${Math.round(seconds / 3600)} h ago`;
    return `${Math.round(seconds / 86400)} days ago`;
  };

  const tick = () => {
    for (const node of document.querySelectorAll("time")) {
      const moment = Date.parse(node.dateTime);
      const text = ago(Math.max(0, (Date.now() + ahead - moment) / 1000));
      if (node.textContent !== text) node.textContent = text;
      node.title = new Date(moment).toLocaleString();
    }
  };

  const poll = async () => {
    if (polling) return;
    polling = true;
    try {
      const answer = await ask("status", { "If-None-Match": etag });
      const date = Date.parse(answer.headers.get("Date"));
      if (date) ahead = date - Date.now();
      if (answer.status !== 304) {
        await renew();
        etag = answer.headers.get("ETag") || "";
      }
      goodAt = Date.now();
      stale.hidden = true;
      wait = document.hidden ? Math.min(wait * 2, SLOWEST) : POLL;
    } catch {
      if (stale.hidden) {
        const since = new Date(goodAt).toLocaleTimeString();
        stale.textContent = `The gateway has not answered since ${since}; what is shown may be old.`;
        stale.hidden = false;
      }
      wait = Math.min(wait * 2, document.hidden ? SLOWEST : FAILED_AT_MOST);
    }
    polling = false;
    clearTimeout(timer);
    timer = setTimeout(poll, wait);
  };

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return;
    clearTimeout(timer);
    wait = POLL;
    timer = setTimeout(poll, 0);
  });

  // A study that cannot be drawn shows its modality in the place of an image.
  const drop = (image) => { image.hidden = true; };
  document.addEventListener("error", (event) => event.target instanceof HTMLImageElement && drop(event.target), true);

  remember(document);
  for (const image of document.images) if (image.complete && !image.naturalWidth) drop(image);
  tick();
  setInterval(() => document.hidden || tick(), 1000);
  timer = setTimeout(poll, POLL);
})();
