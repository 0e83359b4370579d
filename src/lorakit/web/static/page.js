// Charts, live updates and the chat. Every page but the chat also works without this file.
"use strict";

const element = (name, text, kind) => {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
};
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// -- charts ---------------------------------------------------------------------------------------

class Curves {
  constructor(figure, labels, looks = labels.map((_, i) => ({ color: i }))) {
    this.looks = looks;
    this.place = figure.querySelector(".plot");
    this.labels = labels;
    this.data = labels.map(() => [[], []]);
    this.bounds = [];
  }

  draw() {
    const bounds = this.bounds.filter(Boolean);
    if (!this.data.some(([xs]) => xs.length)) {
      this.place.textContent = "no step yet";
      return;
    }
    const last = Math.max(...this.data.map(([xs]) => (xs.length ? xs[xs.length - 1] : 0)));
    const first = Math.min(...this.data.map(([xs]) => (xs.length ? xs[0] : Infinity)));
    const lines = bounds.map(({ value }) => [[first, last], [value, value]]);
    const data = uPlot.join([...this.data.filter(([xs]) => xs.length), ...lines]);
    const shown = this.labels.filter((_, i) => this.data[i][0].length);
    const key = shown.join("|") + bounds.length;
    if (this.chart && this.key === key) {
      this.chart.setData(data);
      return;
    }
    if (this.chart) this.chart.destroy();
    this.key = key;
    this.place.textContent = "";
    this.chart = new uPlot(this.options(shown, bounds), data, this.place);
  }

  options(shown, bounds) {
    const number = (_, value) => (value === null || value === undefined ? "–" : +value.toPrecision(5));
    const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") } };
    const series = shown.map((label) => ({
      label, stroke: color(`--c${this.looks[this.labels.indexOf(label)].color % 8}`), dash: this.looks[this.labels.indexOf(label)].dash, width: 1.5, value: number,
      points: { show: (chart, s) => chart.data[s].filter((y) => y != null).length < 30 },
    }));
    for (const bound of bounds) {
      series.push({ label: bound.name, stroke: color("--c7"), dash: [6, 4], width: 1.5, value: number, points: { show: false } });
    }
    return {
      width: this.place.clientWidth || 320, height: 220, scales: { x: { time: false } }, cursor: { points: { size: 6 } },
      axes: [axis, { ...axis, size: 62, values: (_, all) => all.map((v) => (Math.abs(v) >= 1e4 || (v !== 0 && Math.abs(v) < 1e-2) ? v.toExponential(1) : +v.toPrecision(4))) }],
      series: [{ label: "step", value: number }, ...series],
    };
  }

  resize() {
    if (this.chart) this.chart.setSize({ width: this.place.clientWidth, height: 220 });
  }
}

const drawn = [];
addEventListener("resize", () => drawn.forEach((curves) => curves.resize()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((curves) => {
  curves.key = "";
  curves.draw();
}));

// Names of the curves of a chart by their keys.
const namesOf = (figure) => Object.entries(JSON.parse(figure.dataset.names));

async function curvesOf(name) {
  const answer = await fetch(`run-curves?name=${encodeURIComponent(name)}`);
  return answer.ok ? answer.json() : { curves: {}, bounds: {} };
}

const noPoints = [[], []];

// -- one run --------------------------------------------------------------------------------------

async function watchRun(page) {
  const { name, live } = page.dataset;
  const charts = [...document.querySelectorAll(".chart")].map((figure) => {
    const names = namesOf(figure);
    const curves = new Curves(figure, names.map(([, label]) => label));
    drawn.push(curves);
    return [names.map(([key]) => key), curves];
  });
  const show = async () => {
    const found = await curvesOf(name);
    charts.forEach(([keys, curves]) => {
      curves.bounds = keys.map((key) => found.bounds[key]);
      curves.data = keys.map((key) => found.curves[key] || noPoints);
      curves.draw();
    });
  };
  await show();
  const logs = [...document.querySelectorAll("[data-log]")];
  logs.forEach((log) => { log.scrollTop = log.scrollHeight; });
  if (live === undefined) return;
  const events = new EventSource(`run-events?${new URLSearchParams({ name })}`);
  let [rows, busy] = [null, false];
  events.onmessage = async (event) => {
    const state = JSON.parse(event.data);
    document.getElementById("state").textContent = state.text;
    document.getElementById("progress").value = state.share;
    for (const log of logs) {
      const below = log.scrollTop + log.clientHeight > log.scrollHeight - 40;
      if (state.logs[log.dataset.log]) log.textContent = state.logs[log.dataset.log];
      if (below) log.scrollTop = log.scrollHeight;
    }
    if (!state.train && !state.export) {
      events.close();
      location.replace(`run?name=${encodeURIComponent(name)}`);
    } else if (state.rows !== rows && !busy) {
      [rows, busy] = [state.rows, true];
      await show().finally(() => { busy = false; });
    }
  };
  // The browser connects again by itself; the first event has the complete state.
  events.onerror = () => {
    document.getElementById("state").textContent += " – the connection was lost; reload the page";
  };
}

// -- comparison -----------------------------------------------------------------------------------

async function compareRuns(page) {
  const names = JSON.parse(page.dataset.runs);
  const all = await Promise.all(names.map(curvesOf));
  document.querySelectorAll(".chart").forEach((figure) => {
    const [[key], held] = namesOf(figure);
    const lines = names.flatMap((name, i) => [
      [name, { color: i }, all[i].curves[key]],
      ...(held ? [[`${name}, held out`, { color: i, dash: [3, 3] }, all[i].curves[held[0]]]] : []),
    ]);
    const curves = new Curves(figure, lines.map(([label]) => label), lines.map(([, look]) => look));
    curves.data = lines.map(([, , points]) => points || noPoints);
    drawn.push(curves);
    curves.draw();
  });
}

// -- parts that are asked for again ---------------------------------------------------------------

async function refresh(place, address) {
  const answer = await fetch(address);
  const text = await answer.text();
  if (!answer.ok || place.dataset.last === text) return;
  place.dataset.last = text;
  const active = place.contains(document.activeElement) ? document.activeElement : null;
  const chosen = [...place.querySelectorAll("input:checked")].map((box) => box.value);
  place.replaceChildren(...new DOMParser().parseFromString(text, "text/html").body.childNodes);
  place.querySelectorAll("input[type=checkbox]").forEach((box) => { box.checked = chosen.includes(box.value); });
  if (active) {
    const same = [...place.querySelectorAll("a, input, button")].find((each) => each.outerHTML.split(" id=")[0] === active.outerHTML.split(" id=")[0]
      && each.textContent === active.textContent && each.value === active.value);
    if (same) same.focus({ preventScroll: true });
  }
}

document.querySelectorAll("[data-poll]").forEach((place) => {
  setInterval(() => {
    if (!document.hidden) refresh(place, place.dataset.poll).catch(() => {});
  }, 1000 * place.dataset.seconds);
});

document.querySelectorAll("form[data-live]").forEach((form) => {
  const ask = () => {
    const query = new URLSearchParams(new FormData(form));
    refresh(document.getElementById(form.dataset.target), `${form.dataset.live}?${query}`).catch(() => {});
  };
  let waiting;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(ask, 400);
  });
  if (form.elements.model.value) ask();
});

// -- chat -----------------------------------------------------------------------------------------

function openArena(page) {
  const runs = JSON.parse(page.dataset.runs);
  const columns = JSON.parse(page.dataset.columns);
  const place = (column) => [...page.querySelectorAll("[data-column]")].find((each) => each.dataset.column === column);
  const said = document.getElementById("said");
  const form = document.getElementById("ask");
  const [ask, stop] = [form.querySelector("button"), document.getElementById("stop")];
  let histories = {};
  let latest = {};
  let asked = [];
  let stopping;
  const clear = () => {
    histories = Object.fromEntries(columns.map((column) => [column, []]));
    page.querySelectorAll(".turns").forEach((turns) => turns.replaceChildren());
    page.querySelectorAll(".best").forEach((button) => { button.disabled = true; });
  };
  clear();
  const system = () => document.getElementById("system").value || null;
  const send = (address, body, signal) => fetch(address, {
    method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  const reason = async (answer) => {
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    return (page.querySelector(".fault") || page.body).textContent.trim();
  };

  async function stream(column, settings) {
    const shown = element("p", "…");
    place(column).querySelector(".turns").append(shown);
    const answer = await send("answer", { runs, column, messages: histories[column], settings, system: system() }, stopping.signal);
    if (!answer.ok) throw new Error(await reason(answer));
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let [rest, text] = ["", ""];
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.filter(Boolean)) {
        const { piece, error } = JSON.parse(line);
        if (error) throw new Error(error);
        text += piece || "";
        shown.textContent = text;
      }
    }
    shown.textContent = text || "(an empty answer)";
    histories[column].push({ role: "assistant", content: text });
    latest[column] = text;
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const question = document.getElementById("question").value.trim();
    if (!question || ask.disabled) return;
    const settings = Object.fromEntries([...form.querySelectorAll("[data-sampling]")].map((each) => [each.dataset.sampling, Number(each.value)]));
    stopping = new AbortController();
    [ask.disabled, stop.disabled, latest] = [true, false, {}];
    page.querySelectorAll(".best").forEach((button) => { button.disabled = true; });
    asked = [...histories[columns[columns.length - 1]], { role: "user", content: question }];
    said.textContent = "Answering; the first answer loads the model.";
    try {
      for (const column of columns) {
        histories[column].push({ role: "user", content: question });
        place(column).querySelector(".turns").append(element("p", question, "asked"));
        await stream(column, settings);
      }
      document.getElementById("question").value = "";
      said.textContent = "Choose the best answer to keep it as preference data.";
      page.querySelectorAll(".best").forEach((button) => { button.disabled = false; });
    } catch (error) {
      said.textContent = error.name === "AbortError" ? "Stopped." : error.message;
      columns.forEach((column) => {
        const turns = histories[column];
        if (turns.length && turns[turns.length - 1].role === "user") turns.pop();
      });
    }
    [ask.disabled, stop.disabled] = [false, true];
  });
  stop.addEventListener("click", () => stopping.abort());
  document.getElementById("clear").addEventListener("click", clear);
  page.querySelectorAll(".best").forEach((button) => button.addEventListener("click", async () => {
    const winner = button.closest("[data-column]").dataset.column;
    const answer = await send("vote", { messages: asked, answers: latest, winner, system: system() });
    said.textContent = answer.ok ? (await answer.json()).said : await reason(answer);
    if (answer.ok) page.querySelectorAll(".best").forEach((each) => { each.disabled = true; });
  }));
}

// -- start ----------------------------------------------------------------------------------------

for (const [id, start] of [["run", watchRun], ["compared", compareRuns], ["arena", openArena]]) {
  const page = document.querySelector(`div#${id}`);
  if (page) Promise.resolve(start(page)).catch((error) => console.error(error));
}
