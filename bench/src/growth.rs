//! Curves of cost over size, for people: a table and a picture on logarithmic axes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

/// Milliseconds, policy sets and source classes by size.
#[derive(Debug)]
pub(crate) struct Curve {
    /// What grows.
    pub(crate) name: &'static str,
    /// By how much of it there is.
    pub(crate) points: BTreeMap<u32, (f64, usize, usize)>,
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 70.0;
const BOTTOM: f64 = 360.0;
const COLOURS: [&str; 4] = ["#1f6fb2", "#c0392b", "#2e8b57", "#8e44ad"];
/// Decades of the axes: sizes from 10 to 100,000, milliseconds from 0.1 to 1,000.
const SIZES: (f64, f64) = (1.0, 5.0);
const TIMES: (f64, f64) = (-1.0, 3.0);

/// The table: every point, and the power by which a curve grows between its ends.
#[must_use]
pub(crate) fn table(curves: &[Curve]) -> String {
    let mut text = format!(
        "{:<14} {:>8} {:>10} {:>6} {:>8}\n",
        "full compile", "size", "ms", "sets", "classes"
    );
    for curve in curves {
        for (size, (ms, sets, classes)) in &curve.points {
            writeln!(
                text,
                "{:<14} {size:>8} {ms:>10.2} {sets:>6} {classes:>8}",
                curve.name
            )
            .expect("a String takes every write");
        }
        writeln!(text, "{:<14} grows by size ^ {:.2}", curve.name, curve.power())
            .expect("a String takes every write");
    }
    text
}

impl Curve {
    /// 1 is linear.
    fn power(&self) -> f64 {
        let (Some((low, (from, ..))), Some((high, (to, ..)))) =
            (self.points.first_key_value(), self.points.last_key_value())
        else {
            return 0.0;
        };
        (to / from).ln() / (f64::from(*high) / f64::from(*low)).ln()
    }
}

/// Writes the picture.
///
/// # Errors
/// When the file can't be written.
pub(crate) fn draw(curves: &[Curve], path: &Path) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, picture(curves))
}

fn x(size: f64) -> f64 {
    LEFT + (size.log10() - SIZES.0) / (SIZES.1 - SIZES.0) * (WIDTH - LEFT - 110.0)
}

fn y(ms: f64) -> f64 {
    let share = (ms.max(0.1).log10() - TIMES.0) / (TIMES.1 - TIMES.0);
    BOTTOM - share * (BOTTOM - 50.0)
}

fn picture(curves: &[Curve]) -> String {
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/><text x=\"{LEFT}\" y=\"26\" \
         font-size=\"15\">Full compile, milliseconds over size</text>\n"
    );
    for (label, ms) in [
        ("0.1", 0.1),
        ("1", 1.0),
        ("10", 10.0),
        ("100", 100.0),
        ("1,000", 1e3),
    ] {
        let (at, end) = (y(ms), WIDTH - 110.0);
        text += &format!(
            "<path d=\"M{LEFT} {at}H{end}\" stroke=\"#dde\"/>\
             <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{label}</text>\n",
            LEFT - 8.0,
            at + 4.0
        );
    }
    for (label, size) in [
        ("10", 10.0),
        ("100", 100.0),
        ("1,000", 1e3),
        ("10,000", 1e4),
        ("100,000", 1e5),
    ] {
        let at = x(size);
        text += &format!(
            "<text x=\"{at}\" y=\"{}\" text-anchor=\"middle\">{label}</text>\n",
            BOTTOM + 20.0
        );
    }
    for (curve, colour) in curves.iter().zip(COLOURS) {
        let points: Vec<String> = curve
            .points
            .iter()
            .map(|(size, (ms, ..))| format!("{:.1},{:.1}", x(f64::from(*size)), y(*ms)))
            .collect();
        text += &format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n",
            points.join(" ")
        );
        if let Some((size, (ms, ..))) = curve.points.last_key_value() {
            let (x, y) = (x(f64::from(*size)) + 6.0, y(*ms) + 4.0);
            text += &format!(
                "<text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"{colour}\">{}</text>\n",
                curve.name
            );
        }
    }
    text + "</svg>\n"
}
