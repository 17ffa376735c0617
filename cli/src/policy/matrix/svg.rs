//! The matrix as a picture: ports in the cells while there is room for them, marks beyond.

use thyra_policy_compiler::matrix::{Fate, Group, Matrix, Ports};

use super::{brief, escape, glance, hover, label};

/// Columns that leave room for port numbers.
const ROOMY: usize = 12;
/// Pixels: a line's height, the margin, the gap between namespaces, the width of a letter.
const LINE: usize = 22;
const MARGIN: usize = 16;
const GAP: usize = 8;
const LETTER: usize = 7;
/// Letters of a label that are shown.
const LONGEST: usize = 34;
/// Room above the column labels, for title and legend.
const TITLE: usize = 72;

/// Where things go.
struct Layout {
    /// Width of a cell.
    cell: usize,
    /// Left edge of the cells, top edge of the cells.
    left: usize,
    top: usize,
    /// Whether ports are written into the cells.
    roomy: bool,
}

impl Layout {
    fn of(matrix: &Matrix) -> Self {
        let roomy = matrix.endpoints.len() <= ROOMY;
        let longest = |groups: &[Group]| groups.iter().map(|g| short(g).chars().count()).max().unwrap_or(0);
        let texts = matrix
            .cells
            .iter()
            .flatten()
            .map(|cell| brief(cell).chars().count());
        let cell = if roomy {
            (texts.max().unwrap_or(0).min(LONGEST / 2) * LETTER + 14).max(46)
        } else {
            LINE
        };
        Self {
            cell,
            left: MARGIN + longest(&matrix.sources) * LETTER + 10,
            // Labels stand at 45 degrees.
            top: TITLE + longest(&matrix.endpoints) * LETTER * 7 / 10 + 14,
            roomy,
        }
    }
}

/// The picture.
pub(super) fn picture(matrix: &Matrix) -> String {
    let layout = Layout::of(matrix);
    let columns = places(&matrix.endpoints, layout.left, layout.cell);
    let rows = places(&matrix.sources, layout.top, LINE);
    let overhang = layout.top - TITLE;
    let width = columns.last().map_or(0, |x| x + layout.cell) + overhang + MARGIN;
    let height = rows.last().map_or(0, |y| y + LINE) + MARGIN;
    let mut text = head(width.max(560), height);
    legend(&mut text, layout.roomy);
    for (endpoint, x) in matrix.endpoints.iter().zip(&columns) {
        let (x, y) = (x + layout.cell / 2, layout.top - 8);
        let (title, name) = (escape(&endpoint.members.join(", ")), escape(&short(endpoint)));
        text += &format!(
            "<text x=\"{x}\" y=\"{y}\" transform=\"rotate(-45 {x} {y})\">{name}<title>{title}</title></text>\n"
        );
    }
    for ((source, cells), y) in matrix.sources.iter().zip(&matrix.cells).zip(&rows) {
        let (title, name) = (escape(&source.members.join(", ")), escape(&short(source)));
        let (x, base) = (layout.left - 8, y + 15);
        text += &format!(
            "<text x=\"{x}\" y=\"{base}\" text-anchor=\"end\">{name}<title>{title}</title></text>\n"
        );
        for ((endpoint, cell), x) in matrix.endpoints.iter().zip(cells).zip(&columns) {
            square(&mut text, &layout, (*x, *y), cell, &hover(source, endpoint, cell));
        }
    }
    text + "</svg>\n"
}

fn head(width: usize, height: usize) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"system-ui, sans-serif\" font-size=\"12\" \
         fill=\"#1c2733\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{MARGIN}\" y=\"24\" font-size=\"16\" font-weight=\"600\">Who may talk to whom</text>\n"
    )
}

/// The edges of lines, with a gap where the namespace changes.
fn places(groups: &[Group], start: usize, size: usize) -> Vec<usize> {
    let mut at = start;
    let mut before: Option<&Group> = None;
    let mut places = Vec::with_capacity(groups.len());
    for group in groups {
        if before.is_some_and(|before| before.namespace != group.namespace) {
            at += GAP;
        }
        places.push(at);
        at += size;
        before = Some(group);
    }
    places
}

fn legend(text: &mut String, roomy: bool) {
    let allowed = if roomy {
        "ports that the kernel lets in"
    } else {
        "let in by the kernel: ● on every port, ◐ on some"
    };
    let entries = [
        (Fate::Allow, allowed),
        (Fate::NeedsL7, "~ the request decides"),
        (Fate::Deny, "refused"),
    ];
    let mut x = MARGIN;
    for (fate, what) in entries {
        let (fill, _) = colours(fate);
        text.push_str(&format!(
            "<rect x=\"{x}\" y=\"36\" width=\"14\" height=\"14\" rx=\"3\" fill=\"{fill}\"/>\
             <text x=\"{}\" y=\"47\">{what}</text>\n",
            x + 20
        ));
        x += 40 + what.chars().count() * LETTER;
    }
}

fn square(text: &mut String, layout: &Layout, (x, y): (usize, usize), cell: &[Ports], title: &str) {
    let fate = glance(cell);
    let (fill, ink) = colours(fate);
    let mark = if layout.roomy {
        cut(&brief(cell), (layout.cell - 8) / LETTER)
    } else {
        mark(cell, fate).to_owned()
    };
    text.push_str(&format!(
        "<g><title>{}</title><rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" rx=\"3\" fill=\"{fill}\"/>\
         <text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"{ink}\">{}</text></g>\n",
        escape(title),
        x + 1,
        y + 1,
        layout.cell - 2,
        LINE - 2,
        x + layout.cell / 2,
        y + 15,
        escape(&mark),
    ));
}

/// A mark for a cell, so that colour is not all there is.
fn mark(cell: &[Ports], fate: Fate) -> &'static str {
    let has = |fate| cell.iter().any(|ports| ports.fate == fate);
    match fate {
        Fate::Allow if has(Fate::NeedsL7) => "◐~",
        Fate::Allow if !has(Fate::Deny) => "●",
        Fate::Allow => "◐",
        Fate::NeedsL7 => "~",
        Fate::Deny => "",
    }
}

/// Fill and ink.
const fn colours(fate: Fate) -> (&'static str, &'static str) {
    match fate {
        Fate::Allow => ("#b7e1c0", "#0b4a1c"),
        Fate::NeedsL7 => ("#fde3a7", "#6b4200"),
        Fate::Deny => ("#eceff2", "#9aa5b1"),
    }
}

/// A label that keeps its end, which says how many share the line: the name before it is cut.
fn short(group: &Group) -> String {
    let whole = label(group);
    let over = whole.chars().count().saturating_sub(LONGEST);
    let first = group.members.first().map_or("", String::as_str);
    let most = first.chars().count().saturating_sub(over).max(2);
    cut(&whole.replacen(first, &cut(first, most), 1), LONGEST)
}

fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let head: String = text.chars().take(most.saturating_sub(1)).collect();
    head + "…"
}
