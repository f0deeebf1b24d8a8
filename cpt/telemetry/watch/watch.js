"use strict";
// Keeps a page of `cpt watch` up to date without a flicker: only what has changed is replaced.
(() => {
  const live = document.getElementById("live");
  const calm = live.textContent;

  function tell(isLost) {
    live.classList.toggle("lost", isLost);
    live.textContent = isLost ? `no answer since ${new Date().toLocaleTimeString()}` : calm;
  }

  function every(seconds, action) {
    let isLost = false;
    const again = async () => {
      if (!document.hidden) {
        try {
          await action();
          if (isLost) tell(false);
          isLost = false;
        } catch {
          if (!isLost) tell(true);
          isLost = true;
        }
      }
      setTimeout(again, 1000 * seconds);
    };
    setTimeout(again, 1000 * seconds);
  }

  async function textOf(address) {
    const answer = await fetch(address, {cache: "no-store"});
    if (!answer.ok) throw new Error(answer.statusText);
    return answer.text();
  }

  function renewCells(old, row) {
    [...row.cells].forEach((cell, at) => {
      if (old.cells[at].innerHTML !== cell.innerHTML) old.cells[at].replaceWith(document.adoptNode(cell));
    });
    return old;
  }

  // ---- the index ----------------------------------------------------------------------------
  function followRows(body) {
    const form = document.getElementById("compare");
    const ticked = () => [...body.querySelectorAll("input:checked")].map((box) => box.value);
    const allow = () => (form.querySelector("button").disabled = ticked().length < 2);
    body.addEventListener("change", allow);
    allow();
    every(Number(body.dataset.interval), async () => {
      const parsed = new DOMParser().parseFromString(await textOf(body.dataset.source), "text/html");
      const wanted = parsed.querySelector("tbody");
      const known = new Map([...body.rows].map((row) => [row.dataset.run, row]));
      const rows = [...wanted.rows].map((row) => {
        const old = known.get(row.dataset.run);
        return old === undefined ? document.adoptNode(row) : renewCells(old, row);
      });
      const isSame = rows.length === body.rows.length && rows.every((row, at) => row === body.rows[at]);
      if (!isSame) body.replaceChildren(...rows);
      document.getElementById("counts").textContent = wanted.dataset.counts;
      allow();
    });
  }

  // ---- a page in a frame --------------------------------------------------------------------
  const REST_SECONDS = 15;

  function whenReady(frame, action) {
    const end = Date.now() + 5000;
    const look = () => {
      const page = frame.contentDocument;
      const isReady = page.querySelector(".charts") === null || page.querySelector("html.ready");
      if (isReady || Date.now() > end) action();
      else setTimeout(look, 50);
    };
    look();
  }

  // the next version loads unseen, and takes the place of the old one where that was scrolled to
  function followFrame(place) {
    let touched = 0;
    const listen = (frame) => {
      const note = () => (touched = Date.now());
      for (const kind of ["pointermove", "wheel", "keydown"]) {
        frame.contentWindow.addEventListener(kind, note, {passive: true});
      }
    };
    const first = place.querySelector("iframe");
    first.addEventListener("load", () => listen(first));
    const swap = (old, next) => {
      const axis = old.contentDocument.querySelector(".axis input:checked")?.value;
      next.contentDocument.querySelector(`.axis input[value="${axis}"]`)?.click();
      next.contentWindow.scrollTo(old.contentWindow.scrollX, old.contentWindow.scrollY);
      next.className = "";
      old.remove();
      listen(next);
    };
    let isBusy = false;
    const renew = () => {
      if (isBusy) return;
      isBusy = true;
      const old = place.querySelector("iframe");
      const next = document.createElement("iframe");
      next.className = "next";
      next.title = old.title;
      next.src = place.dataset.source;
      next.addEventListener("load", () => {
        whenReady(next, () => {
          swap(old, next);
          isBusy = false;
        });
      });
      place.append(next);
    };
    let version = place.dataset.newest;
    document.getElementById("update").addEventListener("click", renew);
    every(Number(place.dataset.interval), async () => {
      const newest = await textOf(place.dataset.version);
      if (newest === version || Date.now() - touched < 1000 * REST_SECONDS) return;
      version = newest;
      renew();
    });
  }

  const body = document.getElementById("rows");
  const frames = document.getElementById("frames");
  if (body !== null) followRows(body);
  if (frames !== null) followFrame(frames);
})();
