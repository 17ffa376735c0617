//! `cargo xtask VERB`: runs one verb of the project; make delegates here and nothing else runs things.

use std::process::ExitCode;

use xtask::verb;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match verb::run(&args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
