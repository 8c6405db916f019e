"use strict";
// One page over a run's artefacts. Every text becomes a text node: model output is data and never markup.

const PAGE = 50;
const FATES = { "left out": "left out: the expert talks", failed: "failed", "too easy": "too easy", "all 0": "all 0: never accepted", "all 1": "all 1: always accepted", pivot: "pivots", "held out": "held out" };
const main = document.getElementById("main");
let shown = 0;
let run = null;

function h(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(9)) {
    if (child !== null && child !== undefined && child !== false) made.append(child);
  }
  return made;
}

async function ask(path, parameters) {
  const query = new URLSearchParams(parameters || {});
  const response = await fetch(`api/${path}?${query}`);
  const found = await response.json();
  if (!response.ok) throw new Error(found.error || "the server refused");
  return found;
}

const link = (where, parameters) => {
  const query = new URLSearchParams(Object.entries(parameters || {}).filter(([, v]) => v !== "" && v !== null && v !== undefined));
  return `#/${where}${query.size ? "?" + query : ""}`;
};
const turnLink = (id) => link("turn/" + encodeURIComponent(id));
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const number = (value) => value.toLocaleString("en");
const badge = (text, kind) => h("span", { class: `badge ${(kind || text).replaceAll(" ", "-")}` }, text);

function rate(turn) {
  if (!turn.samples) return h("span", { class: "note" }, "–");
  const fill = h("i");
  fill.style.width = `${100 * turn.rate}%`;
  return h("span", {}, h("span", { class: "bar", "aria-hidden": "true" }, fill), `${turn.hits} of ${turn.samples}`);
}

// ---- overview ----

function overview() {
  const tiles = [];
  const tile = (value, name, where) => tiles.push(h("a", { class: "tile", href: where || "#/" }, h("b", {}, value), h("span", {}, name)));
  if (run.turns) {
    tile(number(run.turns), "candidates", link("turns"));
    tile(number(run.trajectories), "trajectories", link("turns", { sort: "task" }));
    tile(number(run.samples), "samples");
    for (const [fate, count] of Object.entries(run.fates)) tile(number(count), FATES[fate] || fate, link("turns", { fate }));
    if (run.samples) tile(percent(run.truncated / run.samples), "of samples truncated", link("turns", { sort: "truncated", desc: 1 }));
  }
  if (run.pairs) tile(number(run.pairs), "rewarded pairs", link("pairs"));
  if (run.prompts) tile(number(run.prompts), "assessed prompts", link("prompts"));
  const parts = [h("h1", {}, run.folder), h("div", { class: "tiles" }, tiles)];
  if (run.report) parts.push(h("p", {}, h("a", { href: "report.html" }, "report.html"), " has the plots and tables of the whole run."));
  const checks = Object.entries(run.checks).flatMap(([stage, found]) => found.map((check) => ({ stage, ...check })));
  const row = (c) => h("tr", {}, h("td", {}, c.stage), h("td", {}, badge(c.good ? "ok" : "WARN")), h("td", {}, c.name), h("td", { class: "wrap" }, c.found, c.good ? null : h("div", { class: "note" }, "→ " + c.remedy)));
  const table = (found) => h("div", { class: "scroll" }, h("table", {}, h("tbody", {}, found.map(row))));
  if (checks.length) {
    const bad = checks.filter((c) => !c.good), good = checks.filter((c) => c.good);
    parts.push(h("h2", {}, "What the stages warn of"), bad.length ? table(bad) : h("p", {}, "Nothing."));
    if (good.length) parts.push(h("details", {}, h("summary", {}, `${good.length} checks found nothing to warn of`), table(good)));
  }
  if (run.samples) {
    const top = Math.max(1, ...run.rates);
    parts.push(h("h2", {}, "Hit rates: click a bar for its turns"), h("div", { class: "hist" }, run.rates.map((count, n) => {
      const low = n / 10, high = n === 9 ? 1 : (n + 1) / 10 - 1e-9;
      const bar = h("a", { href: link("turns", { low, high }), class: n === 0 ? "zero" : n === 9 ? "one" : "mid", title: `${count} turns, hit rate from ${low}`, "aria-label": `${count} turns with a hit rate from ${low}` });
      bar.style.height = `${100 * count / top}%`;
      return bar;
    })), h("div", { class: "axis" }, h("span", {}, "0"), h("span", {}, "hit rate of the profiled policy"), h("span", {}, "1")));
  }
  const sets = Object.keys(run.sets);
  if (sets.length > 1) {
    parts.push(h("h2", {}, "Pivot sets against each other"), h("ul", {}, sets.flatMap((a) => sets.filter((b) => b !== a).map((b) =>
      h("li", {}, h("a", { href: link("turns", { in: a, out: b }) }, `in ${a}, not in ${b}`))))));
  }
  main.replaceChildren(...parts);
}

// ---- lists ----

function rows(columns, found, open) {
  return found.map((row) => {
    const where = open(row);
    return h("tr", { class: "row", "data-href": where, onclick: (event) => { if (!event.target.closest("a")) location.hash = where; } },
      columns.map((column, n) => {
        const content = column.show(row);
        return h("td", { class: [column.num ? "num" : "", column.wrap ? "wrap" : ""].join(" ").trim() || null }, n === 0 ? h("a", { href: where }, content) : content);
      }));
  });
}

function pages(where, parameters, found) {
  const first = found.total ? found.offset + 1 : 0, last = found.offset + found.rows.length;
  const step = (offset, text) => h("a", { href: link(where, { ...parameters, offset: offset || "" }) }, text);
  return h("div", { class: "pages" }, found.offset > 0 ? step(Math.max(0, found.offset - PAGE), "← previous") : null,
    h("span", { id: "count" }, `${number(first)} to ${number(last)} of ${number(found.total)}`), last < found.total ? step(found.offset + PAGE, "next →") : null);
}

const TURNS = [
  { name: "turn", show: (t) => t.id.slice(0, 24) },
  { name: "task", sort: "task", show: (t) => t.task, wrap: true },
  { name: "expert", sort: "tool", show: (t) => t.tool },
  { name: "depth", sort: "depth", num: true, show: (t) => String(t.depth) },
  { name: "prompt tokens", sort: "tokens", num: true, show: (t) => (t.tokens ? number(t.tokens) : "–") },
  { name: "hit rate", sort: "rate", show: rate },
  { name: "cut", sort: "truncated", num: true, show: (t) => (t.truncated ? String(t.truncated) : "") },
  { name: "fate", sort: "fate", show: (t) => badge(t.fate) },
  { name: "split", show: (t) => t.split },
  { name: "failure", show: (t) => t.failure },
];

async function turns(parameters) {
  const found = await ask("turns", parameters);
  const pick = (name, label, options) => h("label", {}, label, h("select", { name, onchange: submit },
    h("option", { value: "" }, "all"), options.map((o) => h("option", { value: o, selected: parameters[name] === o }, o))));
  const text = (name, label, size) => h("label", {}, label, h("input", { name, value: parameters[name] || "", size: size || 12, type: name === "q" ? "search" : "text" }));
  function submit() { form.requestSubmit(); }
  const form = h("form", { class: "filters", onsubmit: (event) => {
    event.preventDefault();
    const next = Object.fromEntries(new FormData(form));
    location.hash = link("turns", { ...next, in: parameters.in, out: parameters.out, sort: parameters.sort, desc: parameters.desc });
  } }, text("q", "text anywhere in the turn", 22), pick("tool", "expert action", Object.keys(run.tools)), pick("fate", "fate", Object.keys(run.fates)),
    pick("split", "split", Object.keys(run.splits)), Object.keys(run.failures).length ? pick("failure", "failure", Object.keys(run.failures)) : null,
    text("task", "task", 14), text("trajectory", "trajectory", 14), text("low", "hit rate from", 5), text("high", "to", 5),
    h("button", { class: "plain" }, "filter"), h("a", { href: link("turns") }, "clear"));
  const head = TURNS.map((c) => h("th", { class: c.num ? "num" : null, scope: "col" }, c.sort ? h("button", { type: "button", onclick: () => {
    const down = parameters.sort === c.sort && parameters.desc !== "1";
    location.hash = link("turns", { ...parameters, sort: c.sort, desc: down ? "1" : "", offset: "" });
  } }, c.name + (parameters.sort === c.sort ? (parameters.desc === "1" ? " ↓" : " ↑") : "")) : c.name));
  const chosen = parameters.in || parameters.out ? h("p", { class: "note" }, [parameters.in ? `in ${parameters.in}` : "", parameters.out ? `not in ${parameters.out}` : ""].filter(Boolean).join(", ")) : null;
  main.replaceChildren(h("h1", {}, "Turns"), form, chosen || "", pages("turns", parameters, found), h("div", { class: "scroll" },
    h("table", { id: "list" }, h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows(TURNS, found.rows, (t) => turnLink(t.id))))));
}

// ---- conversations ----

const itemText = (content) => (typeof content === "string" ? content : (content || []).map((p) => (typeof p === "string" ? p : p.text || p.refusal || "")).join(""));

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 1); } catch { return text; }
}

function item(entry) {
  if (entry.type === "function_call") return h("div", { class: "msg assistant" }, h("div", { class: "who" }, h("b", {}, "assistant"), "calls ", h("b", {}, entry.name)), h("pre", {}, pretty(entry.arguments)));
  if (entry.type === "function_call_output") return h("div", { class: "msg tool" }, h("div", { class: "who" }, h("b", {}, "tool")), h("pre", {}, itemText(entry.output)));
  if (entry.type === "reasoning") return h("details", { class: "msg assistant" }, h("summary", {}, "reasoning"), h("pre", {}, itemText(entry.summary || entry.content)));
  return h("div", { class: `msg ${entry.role}` }, h("div", { class: "who" }, h("b", {}, entry.role)), h("pre", {}, itemText(entry.content)));
}

function actionText(action) {
  const lines = action.calls.map((c) => `${c.name}(${c.arguments})`);
  if (action.content) lines.unshift(action.content);
  if (!lines.length) lines.push(action.kind === "none" ? "(nothing)" : action.detail ? `(${action.kind}: ${action.detail})` : `(${action.kind})`);
  return lines.join("\n");
}

// lines of two texts, the longest common ones kept
function diff(left, right) {
  const a = left.split("\n").slice(0, 400), b = right.split("\n").slice(0, 400);
  const best = Array.from({ length: a.length + 1 }, () => new Array(b.length + 1).fill(0));
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
  const out = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { out.push(h("span", {}, "  " + a[i])); i++; j++; }
    else if (i < a.length && (j >= b.length || best[i + 1][j] >= best[i][j + 1])) out.push(h("span", { class: "del" }, "− " + a[i++]));
    else out.push(h("span", { class: "add" }, "+ " + b[j++]));
  }
  return h("pre", { class: "diff" }, out);
}

function header(turn) {
  const where = turn.interval ? `95 % interval ${turn.interval[0].toFixed(2)} to ${turn.interval[1].toFixed(2)}` : null;
  return h("div", { class: "who" }, badge(turn.fate), rate(turn), where, turn.truncated ? badge(`${turn.truncated} cut`, "cut") : null, h("a", { href: turnLink(turn.id) }, "samples →"));
}

async function trajectory(id) {
  const found = await ask("trajectory", { id });
  const parts = [h("h1", {}, `Trajectory ${id}`), h("p", { class: "note" }, "task ", h("a", { href: link("turns", { task: found.task }) }, found.task), `, ${found.split}, ${found.turns.length} turns that can be learned`)];
  const of = new Map(found.turns.map((t) => [t.depth, t]));
  let depth = 0, open = false;
  for (const entry of found.state) {
    const own = entry.type === "function_call" || entry.type === "reasoning" || entry.role === "assistant";
    if (own && !open) {
      if (of.has(depth)) parts.push(h("div", { class: "row-of-turn" }, header(of.get(depth))));
      depth++;
    }
    open = own;
    parts.push(item(entry));
  }
  const last = found.turns[found.turns.length - 1];
  parts.push(h("div", {}, header(last)), h("div", { class: "msg now" }, h("div", { class: "who" }, h("b", {}, "expert")), h("pre", {}, actionText(found.expected))));
  main.replaceChildren(...parts);
}

async function showPrompt(place, id) {
  const found = await ask("prompt_text", { id }).catch((error) => ({ problem: String(error.message || error) }));
  place.querySelector("p").replaceWith(found.problem ? h("p", { class: "note" }, `Not shown: ${found.problem}`)
    : h("div", {}, h("p", { class: "note" }, `${number(found.tokens)} tokens, ${number(found.characters)} characters, by the policy's own chat template`), h("pre", { class: "prompt" }, found.text)));
}

async function turn(id) {
  const t = await ask("turn", { id });
  const wanted = actionText(t.expected);
  const near = t.siblings.findIndex((s) => s.id === t.id);
  const step = (n, text) => (t.siblings[n] ? h("a", { href: turnLink(t.siblings[n].id) }, text) : null);
  const parts = [
    h("h1", {}, `Turn ${t.id}`),
    h("div", { class: "pages" }, step(near - 1, "← earlier turn"), h("a", { href: link("trajectory/" + encodeURIComponent(t.trajectory)) }, `trajectory ${t.trajectory}`),
      h("a", { href: link("turns", { task: t.task }) }, `task ${t.task}`), step(near + 1, "later turn →")),
    h("p", { class: "why" }, t.why, t.detail ? ` ${t.detail}` : ""), header(t),
  ];
  if (t.control) parts.push(h("p", { class: "note" }, "Of the control set: drawn in full."));
  if (t.sets.length) parts.push(h("p", { class: "note" }, `In ${t.sets.join(", ")}.`));
  const state = h("details", {}, h("summary", {}, `the state: ${t.state.length} messages, ${t.tools.length} tools`), t.state.map(item));
  const tools = h("details", {}, h("summary", {}, "tools"), h("pre", {}, JSON.stringify(t.tools, null, 1)));
  const prompt = h("details", { id: "prompt" }, h("summary", {}, "the prompt as the policy reads it"), h("p", { class: "note" }, "rendering ..."));
  prompt.addEventListener("toggle", () => showPrompt(prompt, t.id), { once: true });
  state.open = true;
  parts.push(h("h2", {}, "State"), state, tools, prompt, h("h2", {}, "Expert"), h("div", { class: "msg now" }, h("pre", {}, wanted)));
  if (t.reasoning) parts.push(h("details", {}, h("summary", {}, "the expert's reasoning"), h("pre", {}, t.reasoning)));
  parts.push(h("h2", {}, `Samples: ${t.samples} in ${t.groups.length} kinds`));
  if (!t.groups.length) parts.push(h("p", { class: "note" }, "None."));
  for (const g of t.groups) {
    const text = actionText(g.action), equal = text === wanted;
    parts.push(h("div", { class: "card sample" }, h("h3", {}, `${g.count} ×`, badge(g.reward >= 1 ? "accepted" : g.reward > 0 ? `reward ${g.reward}` : "rejected", g.reward > 0 ? "won" : "lost"),
      h("code", {}, g.category), g.rules.length ? h("span", { class: "note" }, `accepted by ${g.rules.length > 1 ? "rules" : "rule"} ${g.rules.join(", ")}`) : null, g.finish_reason === "length" ? badge("cut at max_new_tokens", "cut") : null), h("p", { class: "reason" }, g.words, g.detail ? ` ${g.detail}` : ""),
      equal ? h("pre", {}, text) : h("div", {}, h("p", { class: "note" }, "− the expert, + this sample"), diff(wanted, text)),
      h("details", {}, h("summary", {}, `as generated: ${g.tokens} tokens, log-probability ${g.log_prob.toFixed(2)}`), h("pre", {}, g.text))));
  }
  const labels = Object.keys(t.answers);
  if (labels.length) parts.push(h("h2", {}, "Policies side by side, first sample of each"), h("div", { class: "side" }, labels.map((label) => {
    const a = t.answers[label], scores = a.scores || [];
    return h("div", { class: "card" }, h("h3", {}, label, badge(`${scores.filter((s) => s >= 1).length} of ${scores.length} accepted`), h("code", {}, a.category || "")), h("pre", {}, a.sample || ""));
  })));
  if (t.audit) {
    const odd = t.audit.probes.filter((p) => p.failed);
    parts.push(h("h2", {}, "Audit of the verifier on this turn"), h("p", {}, `${t.audit.probes.length} known actions tried, ${odd.length} judged otherwise than known.`,
      t.audit.won_by_constant ? ` A constant answer wins it: ${t.audit.won_by_constant}.` : "", t.audit.unlosable ? " Any content of the right kind wins it." : ""),
    odd.length ? h("div", { class: "scroll" }, h("table", {}, h("tbody", {}, odd.map((p) => h("tr", {}, h("td", {}, p.side), h("td", {}, p.probe), h("td", {}, String(p.reward)), h("td", {}, p.category), h("td", { class: "wrap" }, p.detail)))))) : null);
  }
  main.replaceChildren(...parts.filter(Boolean));
}

// ---- LLMdoctor ----

async function pairs(parameters) {
  const found = await ask("pairs", parameters);
  const columns = [{ name: "pair", show: (p) => p.id }, { name: "objective", show: (p) => p.objective }, { name: "split", show: (p) => p.split },
    { name: "chosen tokens", num: true, show: (p) => String(p.chosen) }, { name: "rejected tokens", num: true, show: (p) => String(p.rejected) }];
  const filter = h("p", {}, Object.entries(run.objectives).map(([o, n]) => [h("a", { href: link("pairs", { objective: o }) }, `${o} (${n})`), " "]), h("a", { href: link("pairs") }, "all"));
  main.replaceChildren(h("h1", {}, "Rewarded pairs"), filter, pages("pairs", parameters, found), h("div", { class: "scroll" }, h("table", { id: "list" },
    h("thead", {}, h("tr", {}, columns.map((c) => h("th", { class: c.num ? "num" : null }, c.name)))), h("tbody", {}, rows(columns, found.rows, (p) => link("pair/" + encodeURIComponent(p.id)))))));
}

const visible = (text) => (text ? text.replaceAll(" ", "·").replaceAll("\n", "↵\n") : "◌");

function heat(text, strength, colour, title, moved) {
  const made = h("span", { title, class: moved ? "moved" : null }, visible(text));
  if (strength > 0) made.style.backgroundColor = `rgba(${colour}, ${(0.75 * Math.min(1, strength)).toFixed(3)})`;
  return [made, h("wbr")];
}

async function pair(id) {
  const p = await ask("pair", { id });
  const side = (name) => h("div", { class: "card" }, h("h3", {}, name), h("div", { class: "text tokens" }, p[name].map(([text, reward, delta]) =>
    heat(text, Math.abs(reward), reward > 0 ? "40, 160, 80" : "215, 70, 60", `reward ${reward.toFixed(3)}, Delta ${delta.toFixed(4)} nats`))));
  const faces = p.chosen.concat(p.rejected).filter((token) => token.length > 3);
  const top = Math.max(0, ...faces.map((token) => Math.abs(token[3] - token[4])));
  const face = (name, at) => h("div", { class: "card face" }, h("h3", {}, `${name}, by the ${at === 3 ? "positive" : "negative"} face`), h("div", { class: "text tokens" }, p[name].map((token) =>
    heat(token[0], top ? Math.sqrt(Math.max(0, token[at] - token[7 - at]) / top) : 0, at === 3 ? "40, 160, 80" : "215, 70, 60", `probability ${Math.exp(token[at]).toFixed(4)}, log-probability ${token[at].toFixed(4)}`))));
  main.replaceChildren(h("h1", {}, `Pair ${id}`), h("div", { class: "pages" }, p.previous ? h("a", { href: link("pair/" + encodeURIComponent(p.previous)) }, "← previous") : null,
    h("span", {}, `${p.objective}, ${p.split}`), p.next ? h("a", { href: link("pair/" + encodeURIComponent(p.next)) }, "next →") : null),
  h("h2", {}, "Prompt"), h("pre", {}, p.prompt), h("h2", {}, "Token rewards"), h("p", { class: "note" }, "Green: rewarded. Red: punished. Without colour: no reward, the two faces hardly differ there. Hover for figures."),
  h("div", { class: "side" }, side("chosen"), side("rejected")),
  ...(faces.length ? [h("h2", {}, "Faces side by side"), h("p", { class: "note" }, "Coloured: tokens that this face is likelier to write than the other one. The positive face is the patient asked as a good assistant, the negative one as a bad one."),
    h("div", { class: "side" }, face("chosen", 3), face("chosen", 4), face("rejected", 3), face("rejected", 4))] : []));
}

async function promptList(parameters) {
  const found = await ask("prompts", parameters);
  const columns = [{ name: "prompt", show: (p) => String(p.prompt) }, { name: "asked", wrap: true, show: (p) => p.asked }];
  main.replaceChildren(h("h1", {}, "Assessed prompts"), pages("prompts", parameters, found), h("div", { class: "scroll" }, h("table", { id: "list" },
    h("thead", {}, h("tr", {}, columns.map((c) => h("th", {}, c.name)))), h("tbody", {}, rows(columns, found.rows, (p) => link("prompt/" + p.prompt))))));
}

async function prompt(id, parameters) {
  const found = await ask("prompt", { id, ...parameters });
  const sample = Number(parameters.sample || 0);
  const top = Math.max(0, ...found.arms.flatMap((a) => (a.trace || []).map((t) => t[3])));
  const steps = h("div", { class: "pages" }, sample > 0 ? h("a", { href: link("prompt/" + id, { sample: sample - 1 || "" }) }, "← sample before") : null,
    h("span", {}, `sample ${sample + 1} of ${found.samples}`), sample + 1 < found.samples ? h("a", { href: link("prompt/" + id, { sample: sample + 1 }) }, "next sample →") : null);
  main.replaceChildren(h("h1", {}, found.asked), steps, h("p", { class: "note" }, "The darker a token, the further guidance moved the distribution before it was drawn. Bold and underlined: the patient alone would have taken another token. Hover for figures."),
    h("div", { class: "side" }, found.arms.map((a) => h("div", { class: "card arm" }, h("h3", {}, a.arm, Object.entries(a.scores || {}).map(([o, s]) => badge(`${o} ${Number(s).toFixed(2)}`)),
      h("span", { class: "note" }, `KL ${a.kl.toFixed(3)}, ${percent(a.changed)} changed`)), h("div", { class: "text tokens" }, a.trace && a.trace.length ? a.trace.map(([text, patient, mixed, kl, changed]) =>
      heat(text, top ? Math.sqrt(kl / top) : 0, "230, 160, 30", `log-probability ${patient.toFixed(2)} of the patient, ${mixed.toFixed(2)} steered; KL ${kl.toFixed(4)} nats`, changed)) : a.text)))));
}

// ---- links and keys ----

function nav(section) {
  const sections = [["", "overview"]];
  if (run.turns) sections.push(["turns", "turns"]);
  if (run.pairs) sections.push(["pairs", "token rewards"]);
  if (run.prompts) sections.push(["prompts", "steered answers"]);
  document.getElementById("nav").replaceChildren(...sections.map(([where, name]) => h("a", { href: link(where), "aria-current": section === where ? "page" : null }, name)));
}

async function route() {
  const mine = ++shown;
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const parameters = Object.fromEntries(new URLSearchParams(query || ""));
  const [section, ...rest] = path.split("/");
  const id = decodeURIComponent(rest.join("/"));
  main.setAttribute("aria-busy", "true");
  try {
    run = run || await ask("run");
    nav(section);
    if (mine !== shown) return;
    if (section === "turns") await turns(parameters);
    else if (section === "turn") await turn(id);
    else if (section === "trajectory") await trajectory(id);
    else if (section === "pairs") await pairs(parameters);
    else if (section === "pair") await pair(id);
    else if (section === "prompts") await promptList(parameters);
    else if (section === "prompt") await prompt(id, parameters);
    else overview();
  } catch (error) {
    main.replaceChildren(h("p", { class: "error" }, String(error.message || error)), h("p", {}, h("a", { href: "#/" }, "to the overview")));
  }
  if (mine === shown) { main.removeAttribute("aria-busy"); window.scrollTo(0, 0); }
}

function move(by) {
  const all = [...document.querySelectorAll("tr.row")];
  if (!all.length) return;
  const at = all.findIndex((row) => row.classList.contains("selected"));
  const next = all[Math.min(all.length - 1, Math.max(0, at + by))];
  all.forEach((row) => row.classList.toggle("selected", row === next));
  next.scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea")) { if (event.key === "Escape") event.target.blur(); return; }
  if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (event.key === "Enter" && !event.target.closest("a, button, summary")) { const row = document.querySelector("tr.selected"); if (row) location.hash = row.dataset.href; }
  else if (event.key === "u") history.back();
  else if (event.key === "/") { const box = document.querySelector("input[type=search]"); event.preventDefault(); if (box) box.focus(); else location.hash = link("turns"); }
});
window.addEventListener("hashchange", route);
route();
