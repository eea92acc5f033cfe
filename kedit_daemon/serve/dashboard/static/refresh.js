// Looks at the overview again now and then, while nobody is doing anything on it.
"use strict";
const SECONDS = 15;

async function refresh() {
  const live = document.getElementById("live");
  const busy = live.contains(document.activeElement) || !document.getSelection().isCollapsed;
  if (document.hidden || busy) return;
  const reply = await fetch("/", { redirect: "error" });
  if (!reply.ok) return;
  const page = new DOMParser().parseFromString(await reply.text(), "text/html");
  const fresh = page.getElementById("live");
  if (fresh) live.replaceWith(fresh);
}

setInterval(() => refresh().catch(() => {}), SECONDS * 1000);
