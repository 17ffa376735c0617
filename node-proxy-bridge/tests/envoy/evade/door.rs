//! An Envoy as a node starts it, and doors to pods: the listener of a residual as the bridge makes it, with one thing
//! changed. There is no `steer` here that would lead a client to it under the pod's own address, so the way to the
//! pod is written into it.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};

use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3::substitution_format_string::Format;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::{FilterChain, Listener};
use envoy_types::pb::envoy::extensions::filters::common::set_filter_state::v3::filter_state_value::Value;
use envoy_types::pb::envoy::extensions::filters::network::set_filter_state::v3::Config as SetFilterState;
use envoy_types::util::pack_any;
use prost::Message as _;
use tempfile::TempDir;
use thyra_datapath_abi::tables::RuleRef;
use thyra_datapath_abi::{Action, Reason};
use thyra_node_proxy_bridge::ads::{AdsServer, Kind, Name, Outcome, Resource};
use thyra_node_proxy_bridge::authorizer;
use thyra_node_proxy_bridge::cluster::{self, cluster};
use thyra_node_proxy_bridge::envoy::{DEFAULT_HEAP, EnvoyConfig, EnvoyState, Supervisor};
use thyra_node_proxy_bridge::listener::{HttpOptions, Place, Reading, Shape, authorizers, inline, rules};
use thyra_node_proxy_bridge::lower::{self, Chain, Places};
use thyra_node_proxy_bridge::records::Records;
use thyra_policy_compiler::residual::{Answer, Residual};
use thyra_policy_compiler::traffic::PathNormalization;

use super::super::node::{LIMIT, binary, missing};
use super::namespace::Namespace;
use super::pod::{Pod, Serve};

/// As in `thyra_datapath_abi::limits`; the namespace is the test's own.
const FIRST_PORT: u16 = 21_001;
const USER: u32 = 61_003;

/// What stands between a client and the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guard {
    /// Everything, with the mesh's way with paths.
    Full(PathNormalization),
    /// HTTP is read, but no rule is asked.
    NoRules,
    /// Nothing is read at all.
    NoParser,
}

/// All as by default.
pub(super) const FULL: Guard = Guard::Full(PathNormalization::Base);

/// An Envoy with a namespace to listen in.
pub(super) struct Node {
    server: AdsServer,
    supervisor: Supervisor,
    namespace: Namespace,
    /// What the next doors have in common, but for the way with paths.
    pub(super) options: HttpOptions,
    doors: u16,
    /// Where authorizers are.
    pub(super) places: Places,
    _folder: TempDir,
}

/// A listener and the pod behind it.
pub(super) struct Door {
    listener: SocketAddr,
    pub(super) pod: Pod,
}

impl Node {
    /// None where the machine can't, after saying so.
    pub(super) async fn start() -> Option<Self> {
        Self::start_within(DEFAULT_HEAP).await
    }

    /// With so many bytes to allocate.
    pub(super) async fn start_within(heap: u64) -> Option<Self> {
        let binary = binary().await?;
        if !rustix::process::geteuid().is_root() {
            missing("a network namespace needs root");
            return None;
        }
        let folder = tempfile::Builder::new().prefix("thyra-evade-").tempdir().unwrap();
        std::os::unix::fs::chown(folder.path(), Some(USER), Some(USER)).unwrap();
        // No control group, but the file by which a process would join it.
        let cgroup = folder.path().join("cgroup");
        std::fs::create_dir(&cgroup).unwrap();
        let config = EnvoyConfig {
            binary,
            folder: folder.path().to_owned(),
            node: "test".to_owned(),
            concurrency: 1,
            heap,
            user: Some((USER, USER)),
            cgroup: Some(cgroup),
            note: None,
        };
        Some(Self {
            server: AdsServer::start(&config.xds_socket(), config.user).unwrap(),
            supervisor: Supervisor::start(config).unwrap(),
            namespace: Namespace::new(),
            options: HttpOptions::default(),
            doors: 0,
            places: Places::new(),
            _folder: folder,
        })
    }

    /// A door to a new pod.
    pub(super) async fn door(&mut self, residual: &Residual<RuleRef>, guard: Guard, serve: Serve) -> Door {
        let pod = Pod::new(&self.namespace, serve);
        let listener = self.listener(residual, guard, pod.address).await;
        Door { listener, pod }
    }

    /// Bytes of memory that Envoy has of its own.
    pub(super) async fn memory(&self) -> usize {
        let mut state = self.supervisor.state();
        let ready = state
            .wait_for(|state| matches!(state, EnvoyState::Ready { .. }))
            .await;
        let EnvoyState::Ready { pid } = *ready.unwrap() else {
            unreachable!("it was waited for");
        };
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))
            .unwrap();
        let kib: usize = line.trim().trim_end_matches(" kB").parse().unwrap();
        kib * 1024
    }

    /// What Envoy tells.
    pub(super) fn records(&self) -> &Records {
        self.server.records()
    }

    /// A server of the test's own, in the namespace.
    pub(super) fn listen(&self) -> std::net::TcpListener {
        self.namespace.listen()
    }

    /// A listener in front of a server.
    pub(super) async fn listener(
        &mut self,
        residual: &Residual<RuleRef>,
        guard: Guard,
        pod: SocketAddr,
    ) -> SocketAddr {
        let port = FIRST_PORT + self.doors;
        self.doors += 1;
        let (http, other) = chains(residual, guard);
        let shape = Shape {
            name: format!("door-{port}"),
            port,
            http: http.shape(),
            other: other.as_ref().map(Chain::shape),
        };
        let place = Place {
            pod: format!("pod-{port}"),
            netns: self.namespace.path.clone(),
        };
        let paths = match guard {
            Guard::Full(paths) => paths,
            Guard::NoRules | Guard::NoParser => PathNormalization::Base,
        };
        let options = HttpOptions {
            paths,
            ..self.options.clone()
        };
        let listener = towards(inline(&place, &shape, &options), pod, guard);
        // Envoy asks for no rules that nothing in the listener names.
        let mut all = if guard == Guard::NoParser {
            Vec::new()
        } else {
            rules(&shape.http_name(), Reading::Http, &http)
        };
        if let Some(other) = &other {
            all.extend(rules(&shape.other_name(), Reading::Stream, other));
        }
        let residual = "1".into();
        let places = self.places.clone();
        let asked = [&http].into_iter().chain(&other);
        let clusters = authorizer::clusters(asked.clone(), &places);
        all.extend(
            authorizers(&shape.http_name(), Reading::Http, &http, &places)
                .into_iter()
                .map(|one| one.0),
        );
        let mut resources: Vec<_> = all
            .into_iter()
            .map(|one| Resource::rules(one, &residual))
            .collect();
        let way = (Kind::Cluster, cluster::name(&place).into());
        resources.push((way, Resource::cluster(cluster(&place, options.requests_at_once))));
        let needs = resources.iter().map(|(name, _)| name.clone()).collect();
        resources.extend(clusters);
        let name: Name = (Kind::Listener, listener.name.as_str().into());
        resources.push((name, Resource::listener(listener, needs)));
        let names: Vec<Name> = resources.iter().map(|(name, _)| name.clone()).collect();
        self.server.with(|catalog| {
            for (name, resource) in resources {
                catalog.put(name, resource);
            }
        });
        self.accepted(&names).await;
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    async fn accepted(&self, names: &[Name]) {
        let mut changes = self.server.changes();
        let taken = async {
            loop {
                let outcomes: Vec<_> = self
                    .server
                    .read(|catalog| names.iter().map(|name| catalog.outcome(name).cloned()).collect());
                if outcomes.iter().all(|outcome| *outcome == Some(Outcome::Accepted)) {
                    return;
                }
                let refused = outcomes.iter().any(|o| matches!(o, Some(Outcome::Refused(_))));
                assert!(!refused, "{outcomes:?}");
                changes.changed().await.unwrap();
            }
        };
        tokio::time::timeout(LIMIT, taken)
            .await
            .expect("envoy takes the listener");
    }

    /// A connection of a client.
    pub(super) fn connect(&self, door: &Door) -> TcpStream {
        self.connect_to(door.listener)
    }

    pub(super) fn connect_to(&self, listener: SocketAddr) -> TcpStream {
        let since = std::time::Instant::now();
        loop {
            match self.namespace.connect(listener) {
                Ok(stream) => {
                    stream.set_nodelay(true).unwrap();
                    stream.set_read_timeout(Some(LIMIT)).unwrap();
                    stream.set_write_timeout(Some(LIMIT)).unwrap();
                    return stream;
                }
                // Acknowledged is not yet listening.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused && since.elapsed() < LIMIT => {
                    std::thread::yield_now();
                }
                Err(error) => panic!("{listener}: {error}"),
            }
        }
    }

    /// Ends Envoy; what each pod ever got, by connection.
    pub(super) async fn finish<const N: usize>(self, doors: [Door; N]) -> [Vec<Vec<u8>>; N] {
        self.supervisor.stop().await;
        doors.map(|door| door.pod.finish(&self.namespace))
    }

    /// The same for any number of doors.
    pub(super) async fn finish_all(self, doors: Vec<Door>) -> Vec<Vec<Vec<u8>>> {
        self.supervisor.stop().await;
        let pods = doors.into_iter();
        pods.map(|door| door.pod.finish(&self.namespace)).collect()
    }
}

/// The filters of both readings, as `inline::Inline` chooses them.
fn chains(residual: &Residual<RuleRef>, guard: Guard) -> (Chain, Option<Chain>) {
    let mut http = lower::http(residual).unwrap();
    let refused = matches!(residual.other, Answer::Constant(Action::Deny, Reason::NotHttp, _));
    let other = match guard {
        Guard::NoParser => Some(Chain::default()),
        _ if refused => None,
        _ => Some(lower::stream(residual).unwrap()),
    };
    if guard == Guard::NoRules {
        for step in &mut http.steps {
            step.rules = None;
        }
        http.asks.clear();
    }
    (http, other)
}

/// The listener with its way to the pod, and without HTTP if nothing is to be read.
fn towards(mut listener: Listener, pod: SocketAddr, guard: Guard) -> Listener {
    if guard == Guard::NoParser {
        listener.filter_chains.clear();
        listener.listener_filters.clear();
    }
    let default = listener.default_filter_chain.as_mut();
    for chain in listener.filter_chains.iter_mut().chain(default) {
        lead(chain, pod);
    }
    listener
}

fn lead(chain: &mut FilterChain, pod: SocketAddr) {
    let way = &mut chain.filters[0];
    let Some(ConfigType::TypedConfig(packed)) = &mut way.config_type else {
        panic!("{way:?}");
    };
    let mut state = SetFilterState::decode(&*packed.value).unwrap();
    let to = &mut state.on_new_connection[1];
    let Some(Value::FormatString(format)) = &mut to.value else {
        panic!("{to:?}");
    };
    let Some(Format::TextFormatSource(source)) = &mut format.format else {
        panic!("{format:?}");
    };
    let before = Specifier::InlineString("%DOWNSTREAM_DIRECT_LOCAL_ADDRESS%".to_owned());
    assert_eq!(
        source.specifier.replace(Specifier::InlineString(pod.to_string())),
        Some(before)
    );
    *packed = pack_any(state);
}
