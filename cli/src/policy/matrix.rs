//! `thyra policy matrix`: who may talk to whom, as a table, a page or a picture.

mod html;
mod svg;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use serde::Serialize;
use thyra_policy_compiler::matrix::{self, Fate, Group, Matrix, Ports};

use super::{BAD_INPUT, compiled, read_or_tell};
use crate::output::{Format, Show, show, table, write};

/// Sources or endpoints that are still shown one by one.
const SINGLY: usize = 50;

/// How it is asked.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A folder of manifests; may be repeated
    #[arg(long, value_name = "DIR", required_unless_present = "files")]
    manifests: Vec<PathBuf>,
    /// A file, a folder, or - for stdin; may be repeated
    #[arg(short, long = "file", value_name = "PATH")]
    files: Vec<PathBuf>,
    /// Every workload by itself, also beyond 50 of them
    #[arg(long)]
    ungrouped: bool,
}

/// A line or a column, as programs see it.
#[derive(Debug, Serialize)]
struct Side {
    namespace: String,
    members: Vec<String>,
}

/// A source against an endpoint.
#[derive(Debug, Serialize)]
struct Cell {
    from: usize,
    to: usize,
    ports: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    ports: String,
    /// allow | needs-l7 | deny
    fate: &'static str,
    why: String,
    /// 4 or 6 where the families differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    ip: Option<u8>,
}

#[derive(Debug, Serialize)]
struct Shown {
    from: Vec<Side>,
    to: Vec<Side>,
    cells: Vec<Cell>,
    #[serde(skip)]
    matrix: Matrix,
}

impl From<Matrix> for Shown {
    fn from(matrix: Matrix) -> Self {
        let side = |group: &Group| Side {
            namespace: group.namespace.clone(),
            members: group.members.clone(),
        };
        let mut cells = Vec::new();
        for (from, line) in matrix.cells.iter().enumerate() {
            for (to, ports) in line.iter().enumerate() {
                let ports = ports.iter().map(row).collect();
                cells.push(Cell { from, to, ports });
            }
        }
        Self {
            from: matrix.sources.iter().map(side).collect(),
            to: matrix.endpoints.iter().map(side).collect(),
            cells,
            matrix,
        }
    }
}

fn row(ports: &Ports) -> Row {
    Row {
        ports: ports.numbers(),
        fate: ports.fate.name(),
        why: ports.text.clone(),
        ip: (ports.family != 0).then_some(ports.family),
    }
}

impl Show for Shown {
    fn text(&self) -> String {
        let mut header = vec!["FROM \\ TO".to_owned()];
        header.extend(self.matrix.endpoints.iter().map(label));
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        let lines = self.matrix.sources.iter().zip(&self.matrix.cells);
        let rows: Vec<Vec<String>> = lines
            .map(|(source, cells)| {
                let mut row = vec![label(source)];
                row.extend(cells.iter().map(|cell| brief(cell)));
                row
            })
            .collect();
        table(&header, &rows) + "\nports that get in; ~ where the request decides; - where none does\n"
    }
}

/// `shop/cart`, `shop: cart, front`, `shop: cart and 11 more`.
fn label(group: &Group) -> String {
    let Group { namespace, members } = group;
    let first = members.first().map_or("", String::as_str);
    match (namespace.as_str(), members.len()) {
        ("", _) => first.to_owned(),
        (_, 1) => format!("{namespace}/{first}"),
        (_, 2 | 3) => format!("{namespace}: {}", members.join(", ")),
        (_, more) => format!("{namespace}: {first} and {} more", more - 1),
    }
}

/// The ports that may get in: `8080 ~9090`, `-`.
fn brief(cell: &[Ports]) -> String {
    let open = cell.iter().filter(|ports| ports.fate != Fate::Deny);
    let text: Vec<String> = open
        .map(|ports| {
            let l7 = if ports.fate == Fate::NeedsL7 { "~" } else { "" };
            let family = match ports.family {
                0 => String::new(),
                family => format!(" (v{family})"),
            };
            format!("{l7}{}{family}", ports.numbers())
        })
        .collect();
    if text.is_empty() {
        "-".to_owned()
    } else {
        text.join(" ")
    }
}

/// What a person reads when the pointer rests on a cell.
fn hover(source: &Group, endpoint: &Group, cell: &[Ports]) -> String {
    let mut text = format!("{} -> {}", label(source), label(endpoint));
    for ports in cell {
        let family = match ports.family {
            0 => String::new(),
            family => format!("IPv{family} "),
        };
        text += &format!("\n{family}{}: {}", ports.numbers(), ports.text);
    }
    text
}

/// What a cell is at a glance: the best that may happen on any port.
fn glance(cell: &[Ports]) -> Fate {
    cell.iter().map(|ports| ports.fate).min().unwrap_or(Fate::Deny)
}

/// The text with what XML takes for its own written out.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Runs the command.
pub(super) fn run(args: &Args, format: Format) -> Result<ExitCode> {
    let files: Vec<PathBuf> = args.manifests.iter().chain(&args.files).cloned().collect();
    let Some(manifests) = read_or_tell(&files)? else {
        return Ok(ExitCode::from(BAD_INPUT));
    };
    let (world, tables) = compiled(&manifests)?;
    if world.endpoints.is_empty() {
        bail!("the files hold no pods; give those of the cluster too, for example `-f cluster.yaml`");
    }
    let many = world.workloads.len() > SINGLY;
    let matrix = matrix::matrix(&world, &tables, many && !args.ungrouped);
    match format {
        Format::Html => write(&html::page(&matrix))?,
        Format::Svg => write(&svg::picture(&matrix))?,
        Format::Table | Format::Json | Format::Yaml => show(&Shown::from(matrix), format)?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use thyra_policy_compiler::manifest;

    use super::*;

    fn quickstart() -> Matrix {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/lab/quickstart/manifests");
        let manifests = manifest::read_dir(&folder).unwrap();
        let (world, tables) = compiled(&manifests).unwrap();
        matrix::matrix(&world, &tables, false)
    }

    #[test]
    fn the_table_of_the_quickstart() {
        let text = Shown::from(quickstart()).text();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split("   ").map(str::trim).collect())
            .collect();
        let cells = |line: &[&str]| {
            line.iter()
                .filter(|cell| !cell.is_empty())
                .map(ToString::to_string)
                .collect()
        };
        let rows: Vec<Vec<String>> = lines.iter().map(|line| cells(line)).collect();
        let wanted = [
            [
                "FROM \\ TO",
                "ops/monitor",
                "payments/api",
                "payments/ledger",
                "shop/cart",
                "shop/catalog",
                "shop/front",
            ],
            ["ops/monitor", "any", "9090", "-", "-", "any", "any"],
            ["payments/api", "any", "9090", "any", "-", "-", "any"],
            ["payments/ledger", "any", "9090", "-", "-", "-", "any"],
            ["shop/cart", "any", "8080 9090", "-", "any", "any", "any"],
            ["shop/catalog", "any", "9090", "-", "any", "any", "any"],
            ["shop/front", "any", "9090", "-", "any", "any", "any"],
            ["outside", "any", "-", "-", "-", "-", "any"],
        ];
        assert_eq!(rows[..8], wanted.map(|row| row.map(str::to_owned).to_vec()));
    }

    #[test]
    fn page_and_picture_name_the_rule_in_every_cell() {
        let matrix = quickstart();
        for text in [html::page(&matrix), svg::picture(&matrix)] {
            let rule = "allowed by payments/api#0: policy allowed";
            assert!(
                text.contains(&format!("shop/cart -&gt; payments/api\n8080: {rule}")),
                "{text}"
            );
            let title = |text: &str| text.matches(" -&gt; ").count();
            assert_eq!(title(&text), 7 * 6, "a title for each cell");
        }
    }

    #[test]
    fn the_picture_is_well_formed_and_its_labels_keep_how_many_share_them() {
        let mut matrix = quickstart();
        let long = "a-workload-with-a-rather-long-name-0";
        matrix.sources[0].members = (0..12).map(|i| format!("{long}{i:02}")).collect();
        let picture = svg::picture(&matrix);
        assert!(picture.contains("… and 11 more<title>"), "{picture}");
        let count = |tag: &str| picture.matches(tag).count();
        for tag in ["svg", "g", "text", "title"] {
            assert_eq!(
                count(&format!("<{tag}>")) + count(&format!("<{tag} ")),
                count(&format!("</{tag}>")),
                "{tag}"
            );
        }
    }

    #[test]
    fn names_cannot_break_out_of_the_page() {
        let mut matrix = quickstart();
        matrix.sources[0].members[0] = "<script>\"&".to_owned();
        for text in [html::page(&matrix), svg::picture(&matrix)] {
            assert!(!text.contains("<script>"));
            assert!(text.contains("&lt;script&gt;&quot;&amp;"));
        }
    }
}
