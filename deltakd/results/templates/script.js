"use strict";

/* Theme: the system's, or the one chosen here. */
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const shown = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const other = () => (shown() === "dark" ? "light" : "dark");
  const name = () => { button.textContent = other() === "dark" ? "Dark" : "Light"; };
  try { const kept = localStorage.getItem("deltakd-theme"); if (kept) root.dataset.theme = kept; } catch { /* a file */ }
  button.addEventListener("click", () => {
    root.dataset.theme = other();
    try { localStorage.setItem("deltakd-theme", root.dataset.theme); } catch { /* a file */ }
    name();
  });
  dark.addEventListener("change", name);
  name();
})();

/* Token view. All text of models goes through textContent. */
(() => {
  const source = document.getElementById("token-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const get = (id) => document.getElementById(id);
  const [rowSelect, methodSelect, prompt, field, card] =
    ["view-row", "view-method", "view-prompt", "view-tokens", "view-card"].map(get);
  const roles = [["teacher", "teacher"], ["teacher_raw", "raw teacher"], ["student", "student"], ["student_raw", "raw student"]];
  let tokens = [];
  let pinned = false;

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·");
  const quoted = (text) => (text.trim() === text && text ? text : visible(text) || "∅");
  const signed = (x) => (x === null ? "not finite" : (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2) + " nats");
  const shade = (x) => {
    if (x === null) return "transparent";
    const share = Math.min(1, Math.abs(x) / data.scale) * 100;
    return `color-mix(in oklab, var(--${x < 0 ? "less" : "more"}) ${share.toFixed(0)}%, var(--none))`;
  };

  const fillCard = (token) => {
    card.replaceChildren();
    const head = make("header");
    head.append(make("b", "", quoted(token.text)));
    for (const [name, value] of [["teacher's shift ", signed(token.teacher)], ["student's shift ", signed(token.student)],
      ["correlation here ", token.correlation === null ? "undefined" : token.correlation.toFixed(2).replace("-", "−")]]) {
      const item = make("span", "", name);
      item.append(make("strong", "", value));
      head.append(item);
    }
    const columns = make("div", "candidates");
    for (const [role, title] of roles) {
      const column = make("div");
      column.append(make("h5", "", title));
      for (const [text, p] of token.candidates[role] || []) {
        const line = make("div", text === token.text ? "said" : "");
        line.style.setProperty("--share", `${(p * 100).toFixed(1)}%`);
        line.append(make("span", "what", quoted(text)), make("span", "", `${(p * 100).toFixed(1)} %`));
        column.append(line);
      }
      columns.append(column);
    }
    card.append(head, columns);
  };
  const show = (index) => {
    const element = field.children[index];
    for (const other of field.querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
    element.setAttribute("aria-current", "true");
    fillCard(tokens[index]);
    card.hidden = false;
    const room = field.parentElement.clientWidth - card.offsetWidth;
    card.style.left = `${Math.max(0, Math.min(element.offsetLeft + field.offsetLeft - 20, room))}px`;
    card.style.top = `${field.offsetTop + element.offsetTop + element.offsetHeight + 6}px`;
  };
  const hide = () => {
    pinned = false;
    card.hidden = true;
    for (const other of field.querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
  };
  const indexOf = (event) => {
    const element = event.target.closest(".token");
    return element ? Number(element.dataset.index) : -1;
  };

  const draw = () => {
    hide();
    const view = data.views[methodSelect.selectedIndex].rows[Number(rowSelect.value)];
    prompt.textContent = view.prompt;
    prompt.scrollTop = prompt.scrollHeight;
    tokens = view.tokens;
    field.replaceChildren();
    tokens.forEach((token, index) => {
      const blank = token.text.trim() === "";
      const element = make("button", blank ? "token invisible" : "token", blank ? visible(token.text) || "∅" : token.text.replaceAll("\n", "⏎"));
      element.type = "button";
      element.dataset.index = index;
      element.tabIndex = index === 0 ? 0 : -1;
      element.style.setProperty("--above", shade(token.teacher));
      element.style.setProperty("--below", shade(token.student));
      element.setAttribute("aria-label", `${quoted(token.text)}: teacher ${signed(token.teacher)}, student ${signed(token.student)}`);
      field.append(element);
    });
  };
  const fillRows = () => {
    const chosen = Math.max(0, rowSelect.selectedIndex);
    rowSelect.replaceChildren(...data.views[methodSelect.selectedIndex].rows.map((view, index) => {
      const option = make("option", "", `row ${view.row_id}: ${view.title}`);
      option.value = index;
      return option;
    }));
    rowSelect.selectedIndex = Math.min(chosen, rowSelect.length - 1);
    draw();
  };

  field.addEventListener("mouseover", (event) => { const i = indexOf(event); if (i >= 0 && !pinned) show(i); });
  field.addEventListener("mouseleave", () => { if (!pinned) hide(); });
  field.addEventListener("focusin", (event) => { const i = indexOf(event); if (i >= 0) show(i); });
  field.addEventListener("focusout", () => { if (!pinned) hide(); });
  field.addEventListener("click", (event) => { const i = indexOf(event); if (i >= 0) { pinned = true; show(i); } });
  field.addEventListener("keydown", (event) => {
    const i = indexOf(event);
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (i < 0 || to === undefined || to < 0 || to >= tokens.length) return;
    event.preventDefault();
    field.children[i].tabIndex = -1;
    field.children[to].tabIndex = 0;
    field.children[to].focus();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("click", (event) => { if (!event.target.closest(".token, .card")) hide(); });
  methodSelect.replaceChildren(...data.views.map((view) => make("option", "", view.label)));
  methodSelect.addEventListener("change", fillRows);
  rowSelect.addEventListener("change", draw);
  fillRows();
})();
