"""The style sheet of the report."""

STYLE = """
:root { --ink: #0f172a; --muted: #64748b; --line: #e2e8f0; --soft: #f8fafc }
* { box-sizing: border-box }
body {
  margin: 0;
  background: var(--soft);
  color: var(--ink);
  font: 15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px }
h1 { font-size: 34px; line-height: 1.15; margin: 2px 0 10px; letter-spacing: -.02em }
h2 { font-size: 20px; margin: 0 0 4px; letter-spacing: -.01em }
h3 { font-size: 14px; margin: 0 0 6px }
p { margin: 0 0 12px }
section>p { color: var(--muted); max-width: 75ch }
.kicker { text-transform: uppercase; letter-spacing: .12em; font-size: 12px; color: var(--muted); margin: 0 }
.lead { color: var(--muted); font-size: 16px; max-width: 75ch }
section {
  background: #fff;
  border: 1px solid var(--line);
  border-radius: 12px;
  padding: 22px 24px;
  margin: 18px 0;
}
.cards {
  display: grid;
  grid-template-columns: repeat(auto-fit,minmax(240px,1fr));
  gap: 16px;
  background: none;
  border: 0;
  padding: 0;
}
.card { background: #fff; border: 1px solid; border-left-width: 6px; border-radius: 12px; padding: 14px 18px }
.card p { margin: 0; font-size: 13px; font-weight: 600 }
.card strong { display: block; font-size: 22px; letter-spacing: -.01em }
.card strong span { font-weight: 400 }
.card small { color: var(--muted); font-size: 14px }
table { border-collapse: collapse; width: 100% }
th {
  font-size: 12px;
  text-align: left;
  color: var(--muted);
  font-weight: 600;
  padding: 4px 10px 8px;
  border-bottom: 1px solid var(--line);
  white-space: nowrap;
}
td {
  padding: 9px 10px;
  border-bottom: 1px solid var(--line);
  vertical-align: middle;
  font-variant-numeric: tabular-nums;
}
table.main { font-size: 14px }
tr:last-child td { border-bottom: 0 }
td small,th small { display: block; color: var(--muted); font-size: 12px; font-weight: 400 }
.main td:nth-child(5) small { white-space: nowrap }
.main td:first-child small { max-width: 210px }
.size { display: flex; align-items: center; gap: 8px; white-space: nowrap }
.bar { width: 90px; height: 12px; background: var(--line); border-radius: 6px }
.bar i { display: block; height: 12px; border-radius: 6px; background: #2563eb; min-width: 3px }
.pill {
  color: #fff;
  border-radius: 999px;
  padding: 2px 10px;
  font-size: 12px;
  font-weight: 600;
  white-space: nowrap;
}
figure { margin: 8px 0 0 }
figure svg { width: 100%; height: auto; display: block }
.samples { display: grid; grid-template-columns: repeat(auto-fill,minmax(300px,1fr)); gap: 14px }
.sample { border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; background: var(--soft) }
.sample p { margin: 0; font-size: 13.5px; white-space: pre-wrap; overflow-wrap: anywhere }
details { border-top: 1px solid var(--line); padding: 8px 0 }
summary { cursor: pointer; font-weight: 600 }
pre { background: var(--soft); padding: 12px; border-radius: 8px; font-size: 12px; overflow: auto }
code { background: var(--soft); padding: 1px 5px; border-radius: 5px; overflow-wrap: anywhere }
.leaves { font-size: 12.5px }
.leaves td { padding: 3px 10px }
.leaves td:nth-child(n+4) { text-align: right }
.leaves th:nth-child(n+4) { text-align: right }
@media (max-width:760px){.main{display:block;overflow-x:auto}
@media print{body{background:#fff}
section { break-inside: avoid }
"""
