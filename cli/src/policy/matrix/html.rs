//! The matrix as a page that needs nothing else.

use thyra_policy_compiler::matrix::{Fate, Matrix};

use super::{brief, escape, glance, hover, label};

const HEAD: &str = "<!doctype html>
<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Who may talk to whom</title>
<style>
body { font: 13px/1.4 system-ui, sans-serif; margin: 1.5em; color: #1c2733 }
h1 { font-size: 1.2em } p { color: #52606d }
div { overflow: auto; max-height: 88vh }
table { border-collapse: separate; border-spacing: 2px }
th { background: #fff; text-align: left; font-weight: 500; white-space: nowrap; padding: 2px 6px }
thead th { position: sticky; top: 0; z-index: 1; vertical-align: bottom }
tbody th { position: sticky; left: 0 }
tr.next > * { border-top: 3px solid #cbd2d9 }
td { padding: 3px 8px; border-radius: 3px; text-align: center; white-space: nowrap }
.allow { background: #b7e1c0; color: #0b4a1c } .l7 { background: #fde3a7; color: #6b4200 }
.deny { background: #eceff2; color: #7b8794 }
</style></head><body>
<h1>Who may talk to whom</h1>
<p>Rows are sources, columns are endpoints; a cell lists the ports that get in, <span class=\"l7\">~ where the request
decides</span>, and rests on the rule that says so (point at it).</p>
<div><table><thead><tr><th></th>";

/// The page.
pub(super) fn page(matrix: &Matrix) -> String {
    let mut text = HEAD.to_owned();
    for endpoint in &matrix.endpoints {
        text += &format!(
            "<th title=\"{}\">{}</th>",
            escape(&endpoint.members.join(", ")),
            escape(&label(endpoint))
        );
    }
    text += "</tr></thead><tbody>\n";
    let mut before = None;
    for (source, cells) in matrix.sources.iter().zip(&matrix.cells) {
        let next = before.is_some_and(|before| before != &source.namespace);
        before = Some(&source.namespace);
        text += if next { "<tr class=\"next\">" } else { "<tr>" };
        text += &format!(
            "<th title=\"{}\">{}</th>",
            escape(&source.members.join(", ")),
            escape(&label(source))
        );
        for (endpoint, cell) in matrix.endpoints.iter().zip(cells) {
            let class = match glance(cell) {
                Fate::Allow => "allow",
                Fate::NeedsL7 => "l7",
                Fate::Deny => "deny",
            };
            let title = escape(&hover(source, endpoint, cell));
            text += &format!(
                "<td class=\"{class}\" title=\"{title}\">{}</td>",
                escape(&brief(cell))
            );
        }
        text += "</tr>\n";
    }
    text + "</tbody></table></div></body></html>\n"
}
