//! The command `thyra-agent`: flags, logs, signals.
//!
//! Invariant: exit 0 after a stop that was asked for, 2 for a configuration that can't be used, 1 for
//! anything else.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use thyra_agent::config::LogFormat;
use thyra_agent::{Config, ConfigError, Settings};
use thyra_node_proxy_bridge::envoy::{Binary, Launch, launch};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// glibc's keeps what large tables leave behind, some 50 MiB on a node of 50 pods, and takes longer (docs/design/0016).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Enforces Istio's identity policy in the kernel, at each pod of this node
#[derive(Parser)]
#[command(name = "thyra-agent", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    settings: Settings,
    /// End all enforcement: remove every pin below --bpffs, then exit
    #[arg(long)]
    cleanup: bool,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Become the Envoy of an agent that has `--envoy-socket`, once it wants one, with nothing that Envoy doesn't need
    Envoy(EnvoyArgs),
}

#[derive(clap::Args)]
#[command(
    after_help = "Example: thyra-agent envoy --envoy-socket=/run/envoy/xds.sock --envoy=/usr/local/bin/envoy"
)]
struct EnvoyArgs {
    /// The agent's `--envoy-socket`; this process must find its folder at the same path
    #[arg(long, value_name = "PATH")]
    envoy_socket: PathBuf,
    /// Envoy's binary [default: the one in $PATH]
    #[arg(long, value_name = "PATH")]
    envoy: Option<PathBuf>,
    /// The agent's `--envoy-user`
    #[arg(long, value_name = "UID", default_value_t = thyra_agent::config::DEFAULT_ENVOY_USER)]
    envoy_user: u32,
    /// Envoy's worker threads
    #[arg(long, value_name = "N", default_value_t = thyra_agent::l7::CONCURRENCY)]
    concurrency: u16,
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
    if let Some(Command::Envoy(args)) = cli.command {
        return envoy(args);
    }
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

/// Returns only when it can't become Envoy.
fn envoy(args: EnvoyArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let binary = runtime.block_on(Binary::find(args.envoy.as_deref(), None))?;
    drop(runtime);
    let folder = args
        .envoy_socket
        .parent()
        .context("`--envoy-socket` names no file")?;
    let error = launch(Launch {
        binary,
        folder: folder.to_owned(),
        user: args.envoy_user,
        concurrency: args.concurrency,
    });
    Err(error).context("can't become envoy")
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
