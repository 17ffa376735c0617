//! The command `thyra-agent`: flags, logs, signals.
//!
//! Invariant: exit 0 after a stop that was asked for, 2 for a configuration that can't be used, 1 for
//! anything else.

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use thyra_agent::config::LogFormat;
use thyra_agent::{Config, ConfigError, Settings};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// glibc's keeps what large tables leave behind, some 50 MiB on a node of 50 pods, and takes longer (docs/design/0016).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Enforces Istio's identity policy in the kernel, at each pod of this node
#[derive(Parser)]
#[command(name = "thyra-agent", version)]
struct Cli {
    #[command(flatten)]
    settings: Settings,
    /// End all enforcement: remove every pin below --bpffs, then exit
    #[arg(long)]
    cleanup: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = if error.is::<ConfigError>() { 2 } else { 1 };
            eprintln!("thyra-agent: {error:#}");
            ExitCode::from(code)
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<()> {
    let settings = cli.settings.with_file()?;
    if cli.cleanup {
        let bpffs = settings
            .bpffs
            .unwrap_or_else(|| thyra_agent::config::DEFAULT_BPFFS.into());
        return thyra_datapath::Datapath::cleanup(&bpffs).context("pins can't be removed");
    }
    let config = settings.resolve()?;
    log(&config)?;
    let threads = std::thread::available_parallelism()
        .map_or(2, usize::from)
        .clamp(2, 4);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()?;
    let done = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let asked = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        anyhow::Ok(thyra_agent::run(config, asked).await?)
    });
    // Tasks that still block (a watch, say) must not keep the process.
    runtime.shutdown_background();
    done
}

fn log(config: &Config) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log)
        .with_context(|| format!("`--log`: `{}` is not a filter", config.log))?;
    let terminal = std::io::stderr().is_terminal();
    let logs = tracing_subscriber::fmt()
        .with_ansi(terminal)
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().init(),
    }
    Ok(())
}
