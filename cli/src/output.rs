//! How answers are shown: a table for people, JSON or YAML for programs, all from the same value.
//!
//! Invariant: with `json` or `yaml` nothing but the value goes to stdout.

use std::io::{IsTerminal, Write};

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

/// `-o`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// Columns for people.
    #[default]
    Table,
    /// One JSON value.
    Json,
    /// One YAML document.
    Yaml,
    /// A page (`policy matrix` alone).
    Html,
    /// A picture (`policy matrix` alone).
    Svg,
}

/// The option that every command has.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Output {
    /// How to show the answer
    #[arg(short, long, value_enum, default_value_t, global = true)]
    pub(crate) output: Format,
}

/// A value that can be shown as a table too.
pub(crate) trait Show: Serialize {
    /// The text for people, ending with a line break.
    fn text(&self) -> String;
}

/// Shows `value` on stdout.
pub(crate) fn show(value: &impl Show, format: Format) -> Result<()> {
    let text = match format {
        Format::Table => value.text(),
        Format::Json => serde_json::to_string_pretty(value).context("write JSON")? + "\n",
        Format::Yaml => serde_saphyr::to_string(value).context("write YAML")?,
        Format::Html | Format::Svg => return Err(no_picture()),
    };
    write(&text)
}

/// Shows one of the values that come as they happen: a line for people, a line of JSON or a document of YAML.
pub(crate) fn show_next(value: &impl Serialize, line: impl FnOnce() -> String, format: Format) -> Result<()> {
    let text = match format {
        Format::Table => line(),
        Format::Json => serde_json::to_string(value).context("write JSON")? + "\n",
        Format::Yaml => format!("---\n{}", serde_saphyr::to_string(value).context("write YAML")?),
        Format::Html | Format::Svg => return Err(no_picture()),
    };
    write(&text)
}

/// What every other command says.
pub(crate) fn no_picture() -> anyhow::Error {
    anyhow!("only `policy matrix` makes pages and pictures; give `-o table`, `-o json` or `-o yaml`")
}

/// Writes `text` to stdout; a reader that went away (`| head`) is no error.
pub(crate) fn write(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("write to stdout"),
    }
}

/// Columns of equal width, two spaces apart, without trailing blanks.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        padded.join("   ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut header.iter().copied());
    for row in rows {
        text += &line(&mut row.iter().map(String::as_str));
    }
    text
}

/// `text` in a colour (an ANSI SGR number) when stdout is a terminal.
pub(crate) fn coloured(text: &str, colour: u8) -> String {
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{colour}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// Red.
pub(crate) const RED: u8 = 31;
/// Green.
pub(crate) const GREEN: u8 = 32;
/// Yellow.
pub(crate) const YELLOW: u8 = 33;

/// One end of a connection: an IPv6 address stands in brackets.
pub(crate) fn socket(address: &str, port: u32) -> String {
    if address.contains(':') {
        format!("[{address}]:{port}")
    } else {
        format!("{address}:{port}")
    }
}

/// A dash for what isn't there.
pub(crate) fn dash(text: &str) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![
            vec!["1".to_owned(), "shop/front".to_owned()],
            vec!["22".to_owned(), String::new()],
        ];
        assert_eq!(table(&["ID", "POD"], &rows), "ID   POD\n1    shop/front\n22\n");
    }
}
