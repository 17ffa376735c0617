//! One agent from start to stop.
//!
//! Invariant: what can fail fails before anything is enforced; stopping takes nothing away from the kernel.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use thyra_datapath::{Datapath, Deny, Hook, HostTraffic, NonTcp, OpenError, Order, Place};
use thyra_node_proxy_bridge::hold::{Counts, Keeper};
use thyra_proto::thyra::v1::admin_service_server::AdminServiceServer;
use thyra_proto::thyra::v1::endpoint_service_server::EndpointServiceServer;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::admin::{About, Admin};
use crate::board::Board;
use crate::chain::chain;
use crate::change::Topic;
use crate::config::{
    AttachChoice, Config, DenyChoice, HoldChoice, HookChoice, HostTrafficChoice, NonTcpChoice, PolicySource,
};
use crate::flows::{self, Flows};
use crate::held::Basis;
use crate::l7::{self, L7, L7Error};
use crate::metrics::{self, Metrics};
use crate::monitor::Hub;
use crate::plane::{Plane, PlaneError};
use crate::pump::Pump;
use crate::requests::Requests;
use crate::service::Endpoints;
use crate::socket::{self, SocketError};
use crate::source::{self, Feed};
use crate::state_file::StateError;
use crate::store::{Command, Handle, Parts, SharedPlane, Store, lock};
use crate::{board, http};

/// How often finished connections are removed and failed attachments tried again.
const TICK: Duration = Duration::from_secs(1);
/// How long callers may take to finish when the agent stops.
const GRACE: Duration = Duration::from_secs(3);

/// Why the agent can't run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The datapath can't be had.
    #[error("the datapath can't be opened")]
    Datapath(#[from] OpenError),
    /// Nor its events.
    #[error("the kernel's events can't be read")]
    Events(#[from] PlaneError),
    /// The state folder.
    #[error("the state folder can't be used")]
    State(#[from] StateError),
    /// The state folder can't be made.
    #[error("can't make the state folder `{folder}`")]
    StateFolder {
        /// Path.
        folder: String,
        /// Cause.
        source: io::Error,
    },
    /// The socket.
    #[error("the admin socket can't be had")]
    Socket(#[from] SocketError),
    /// The way to Envoy.
    #[error("envoy can't be used")]
    Envoy(#[from] L7Error),
    /// The metrics address.
    #[error(
        "metrics address `{address}` can't be used; free it, or give `--metrics=ADDRESS` or `--metrics=off`"
    )]
    Metrics {
        /// As configured.
        address: SocketAddr,
        /// Cause.
        source: io::Error,
    },
    /// The store's thread ended by itself.
    #[error("the store has failed; what is enforced stays enforced, start the agent again")]
    Store,
    /// The admin API ended by itself.
    #[error("the admin API has failed")]
    Api(#[from] tonic::transport::Error),
}

/// Runs an agent on this node's real datapath until `shutdown`.
///
/// # Errors
/// It can't start, or its API fails.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
    let datapath = open(&config)?;
    run_on(Box::new(datapath), config, shutdown).await
}

fn open(config: &Config) -> Result<Datapath, RunError> {
    make_state(config)?;
    Ok(Datapath::open(thyra_datapath::Config {
        bpffs: config.bpffs.clone(),
        state_dir: config.state.clone(),
        deny: match config.deny {
            DenyChoice::Reset => Deny::Reset,
            DenyChoice::Drop => Deny::Drop,
        },
        hook: match config.attach {
            AttachChoice::Auto => None,
            AttachChoice::Tcx | AttachChoice::TcxLast => Some(Hook::Tcx),
            AttachChoice::Clsact => Some(Hook::Clsact),
        },
        place: match config.hook {
            HookChoice::Host => Place::Host,
            HookChoice::Pod => Place::Pod,
        },
        order: match config.attach {
            AttachChoice::TcxLast => Order::Last,
            _ => Order::First,
        },
        host_traffic: match config.host_traffic {
            HostTrafficChoice::Allow => HostTraffic::Allow,
            HostTrafficChoice::Enforce => HostTraffic::Enforce,
        },
        non_tcp: match config.non_tcp {
            NonTcpChoice::Pass => NonTcp::Pass,
            NonTcpChoice::Enforce => NonTcp::Enforce,
        },
        l7_connections: config.l7_connections,
        // Only while somebody listens: `Admin::monitor`.
        report_new: false,
        local_redirect: config.local_redirect,
        flow_log: None,
    })?)
}

fn make_state(config: &Config) -> Result<(), RunError> {
    let wrong = |source| RunError::StateFolder {
        folder: config.state.display().to_string(),
        source,
    };
    std::fs::create_dir_all(&config.state).map_err(wrong)
}

/// Runs an agent on any datapath until `shutdown`.
///
/// # Errors
/// It can't start, or its API fails.
// long: parts are started in the order in which they need each other, and stopped in reverse
pub async fn run_on(
    plane: Box<dyn Plane>,
    config: Config,
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    make_state(&config)?;
    // Every TLS connection takes this one; a second installation in one process changes nothing.
    drop(rustls::crypto::ring::default_provider().install_default());
    let (listener, _socket) = socket::listen(&config.socket).await?;
    let metrics_listener = match config.metrics {
        Some(address) => {
            let wrong = |source| RunError::Metrics { address, source };
            Some(http::bind(address).await.map_err(wrong)?)
        }
        None => None,
    };
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let hub = Hub::default();
    let events = plane.events()?;
    let plane: SharedPlane = Arc::new(RwLock::new(plane));
    let sources = source::all(&config);
    let board = Arc::new(Board::default());
    for source in &sources {
        board.expect(
            source.name(),
            &source.topics().into_iter().map(Topic::name).collect::<Vec<_>>(),
        );
    }
    let metrics = Arc::new(Metrics::default());
    let options = l7::Options {
        envoy: config.envoy.clone(),
        user: config.envoy_user,
        budget: config.budget,
        redact: config.redact,
        folder: beside(&config.socket, "envoy"),
        state: config.state.clone(),
        node: config.node.name.clone(),
    };
    let mut l7 = L7::open(&options, register(&plane)).await?;
    let held = l7
        .as_mut()
        .filter(|_| config.l7_hold != HoldChoice::Off)
        .and_then(|l7| hold(l7, config.l7_hold, &plane, &mut tasks, &stop));
    let news = l7.as_ref().map(L7::changes);
    let records = l7.as_ref().map(L7::records);
    let (handle, store) = Store::start(Parts {
        plane: plane.clone(),
        state: config.state.clone(),
        basis: basis(&config, source::awaited(&sources)),
        metrics: metrics.clone(),
        hub: hub.clone(),
        l7,
    })?;
    let requests = Arc::new(Requests::default());
    if let Some(records) = records {
        let follow = requests
            .clone()
            .follow(records, handle.watch(), hub.clone(), stop.clone());
        tasks.spawn(follow);
    }
    for news in news.into_iter().flatten() {
        tasks.spawn(tell_of_envoy(news, handle.clone(), stop.clone()));
    }
    let flows = Arc::new(Flows::new(config.flow_log, config.flow_log_sampling));
    lock::write(&plane).flow_log(flows.reports());
    if let Some(events) = events {
        let pump = Pump {
            hub: hub.clone(),
            flows: flows.clone(),
            plane: plane.clone(),
            snapshot: handle.watch(),
        };
        tasks.spawn(pump.run(events, stop.clone()));
    }
    if flows.reports().is_some() {
        let follow = flows::watch::follow(flows.clone(), plane.clone(), handle.watch(), stop.clone());
        tasks.spawn(follow);
    }
    if let Some(listener) = metrics_listener {
        let mut registry = metrics::registry(
            &metrics,
            plane.clone(),
            board.clone(),
            requests.clone(),
            flows.clone(),
        );
        if let Some(held) = held {
            metrics::held(&mut registry, held);
        }
        tasks.spawn(http::serve(listener, Arc::new(registry), stop.clone()));
    }
    for source in sources {
        tasks.spawn(source.run(Feed::new(handle.clone(), board.clone()), stop.clone()));
    }
    tasks.spawn(tick(handle.clone(), stop.clone()));
    let about = About {
        node: config.node.name.clone(),
        policy_source: config.policy_source.name().to_owned(),
        started_unix: board::unix_now(),
    };
    let admin = Admin {
        handle: handle.clone(),
        plane: plane.clone(),
        board,
        hub,
        requests,
        flows,
        about: Arc::new(about),
        stop: stop.clone(),
    };
    let endpoints = Endpoints {
        handle: handle.clone(),
        plane: plane.clone(),
    };
    info!(socket = %config.socket.display(), node = config.node.name, "agent is ready");
    let served = serve(listener, admin, endpoints, &stop, shutdown).await;
    stop.cancel();
    tasks.shutdown().await;
    // Nobody would read it.
    lock::write(&plane).flow_log(None);
    drop(handle);
    if tokio::time::timeout(GRACE, tokio::task::spawn_blocking(move || store.join()))
        .await
        .is_err()
    {
        warn!("the store is still busy; stopping all the same");
    }
    info!(
        generation = lock::read(&plane).generation(),
        "agent has stopped; what is enforced stays enforced"
    );
    served
}

async fn serve(
    listener: tokio::net::UnixListener,
    admin: Admin,
    endpoints: Endpoints,
    stop: &CancellationToken,
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let store = endpoints.handle.clone();
    let server = tonic::transport::Server::builder()
        .add_service(EndpointServiceServer::new(endpoints))
        .add_service(AdminServiceServer::new(admin))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.clone().cancelled_owned());
    tokio::pin!(server);
    tokio::select! {
        served = &mut server => return Ok(served?),
        () = store.stopped() => return Err(RunError::Store),
        () = shutdown => {}
    }
    stop.cancel();
    // It has already stopped if it can't be told.
    let _stopped = store.send(Command::Stop);
    // A listener of `monitor` never ends by itself.
    match tokio::time::timeout(GRACE, server).await {
        Ok(served) => Ok(served?),
        Err(_) => Ok(()),
    }
}

fn basis(config: &Config, awaited: std::collections::BTreeSet<Topic>) -> Basis {
    let mut node = config.node.clone();
    // It alone tells of nodes, and of every namespace.
    node.namespaces_are_told = awaited.contains(&Topic::Nodes);
    Basis {
        node,
        root_namespace: config.root_namespace.clone(),
        trust_domain: config.trust_domain.clone(),
        awaited,
        listed_policies: config.policy_source == PolicySource::Authorization,
        identities: std::collections::BTreeMap::new(),
        identity_grace: config.identity_grace,
    }
}

/// Lets the kernel know Envoy's sockets; whether it has known them all the time.
fn register(plane: &SharedPlane) -> l7::Register {
    let plane = plane.clone();
    Box::new(move |cgroup| {
        let registered = lock::write(&plane).register_envoy(cgroup);
        registered.map_err(|error| chain(&error))
    })
}

/// A file beside another one.
fn beside(file: &Path, name: &str) -> PathBuf {
    file.parent().unwrap_or(Path::new(".")).join(name)
}

/// Holds connections that can be judged once, where that is possible here; what becomes of them.
fn hold(
    l7: &mut L7,
    choice: HoldChoice,
    plane: &SharedPlane,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> Option<Arc<Counts>> {
    let holding = lock::write(plane).hold();
    let holding = match holding {
        Ok(Some(holding)) => holding,
        Ok(None) => return None,
        Err(error) => {
            warn!(
                error = chain(&error),
                "nothing can be held: all that needs L7 goes through envoy"
            );
            return None;
        }
    };
    let known = lock::read(plane).holds();
    let oracles = l7.hold(choice == HoldChoice::All, known);
    let keeper = Keeper::new(holding, oracles, l7.records());
    let (stop, counts) = (stop.clone(), keeper.counts());
    tasks.spawn(async move {
        tokio::select! {
            ended = keeper.run() => if let Err(error) = ended {
                warn!(%error, "connections are no longer held: those that would be are dropped");
            },
            () = stop.cancelled() => {}
        }
    });
    Some(counts)
}

async fn tell_of_envoy(mut news: watch::Receiver<u64>, handle: Handle, stop: CancellationToken) {
    loop {
        tokio::select! {
            changed = news.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
        if !handle.send(Command::Envoy) {
            return;
        }
    }
}

async fn tick(handle: Handle, stop: CancellationToken) {
    let mut timer = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            _ = timer.tick() => {}
            () = stop.cancelled() => return,
        }
        if !handle.send(Command::Tick) {
            return;
        }
    }
}
