//! A scenario folder: `manifests/`, `scenario.yaml`, `probes.yaml`.
//!
//! Invariant: everything in it is read and checked before anything is started; a stranger's mistake names
//! file and line.

mod probes;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(crate) use probes::{
    Action, ConnectionState, Entry, Expect, Family, HttpRequest, Kind, Peer, Probe, Target, TlsHello,
};
use thyra_policy_compiler::manifest::{self, Manifests};

use super::model::MAX_NODES;
use super::yaml::{self, Problem};

/// How pods hang on their node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Topology {
    /// A route to each pod's veth.
    #[default]
    Ptp,
    /// A bridge with all veths.
    Bridge,
}

/// A flag of the agent from `scenario.yaml`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AgentFlag {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) file: Arc<Path>,
    pub(crate) line: usize,
}

/// `scenario.yaml`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    pub(crate) agent: Vec<AgentFlag>,
    pub(crate) nodes: u8,
    pub(crate) topology: Topology,
}

/// The whole folder.
pub(crate) struct Scenario {
    pub(crate) folder: PathBuf,
    pub(crate) settings: Settings,
    pub(crate) manifests: Manifests,
    pub(crate) probes: Vec<Entry>,
}

/// Why a scenario can't be run; each line names its place.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub(crate) struct ScenarioError(pub(crate) Vec<String>);

impl From<Problem> for ScenarioError {
    fn from(problem: Problem) -> Self {
        Self(vec![problem.to_string()])
    }
}

impl Scenario {
    /// The folder's last name, as reports show it.
    pub(crate) fn name(&self) -> String {
        let folder = std::path::absolute(&self.folder).unwrap_or_else(|_| self.folder.clone());
        folder.file_name().map_or_else(
            || "scenario".to_owned(),
            |name| name.to_string_lossy().into_owned(),
        )
    }

    /// Reads and checks the folder.
    ///
    /// # Errors
    /// Every problem found, one a line.
    pub(crate) fn read(folder: &Path) -> Result<Self, ScenarioError> {
        let manifests_folder = folder.join("manifests");
        if !manifests_folder.is_dir() {
            return Err(ScenarioError(vec![format!(
                "`{}` is no scenario: it has no folder `manifests`; put the Kubernetes objects there",
                folder.display()
            )]));
        }
        let mut problems = Vec::new();
        let manifests = manifest::read_dir(&manifests_folder)
            .map_err(|errors| problems.extend(errors.iter().map(ToString::to_string)));
        let settings = read_settings(&folder.join("scenario.yaml"))
            .map_err(|problem| problems.push(problem.to_string()));
        let probes = probes::read(&folder.join("probes.yaml"))
            .map_err(|found| problems.extend(found.iter().map(ToString::to_string)));
        let (Ok(manifests), Ok(settings), Ok(probes)) = (manifests, settings, probes) else {
            return Err(ScenarioError(problems));
        };
        let scenario = Self {
            folder: folder.to_owned(),
            settings,
            manifests,
            probes,
        };
        scenario.check_names()?;
        Ok(scenario)
    }

    /// The path of a file that an `apply` or `delete` names.
    pub(crate) fn file(&self, path: &Path) -> PathBuf {
        self.folder.join(path)
    }

    /// Probes may name only what the manifests, or an earlier `apply`, define.
    fn check_names(&self) -> Result<(), ScenarioError> {
        let mut problems = Vec::new();
        let mut known = Names::default();
        known.add(&self.manifests);
        let mut open = BTreeSet::new();
        for entry in &self.probes {
            match &entry.action {
                Action::Probe(probe) => known.check(entry, probe, &mut problems),
                Action::Open { name, probe } => {
                    known.check(entry, probe, &mut problems);
                    if !open.insert(name.clone()) {
                        problems
                            .push(entry.problem(format!("connection `{name}` is opened twice; rename one")));
                    }
                }
                Action::ExpectOpen { name, .. } if !open.contains(name) => {
                    problems
                        .push(entry.problem(format!("no connection `{name}` was opened before; add `open`")));
                }
                Action::ExpectOpen { .. } => {}
                Action::Apply(files) => {
                    for file in files {
                        self.read_change(entry, file, &mut problems)
                            .inspect(|change| known.add(change));
                    }
                }
                Action::Delete(files) => {
                    for file in files {
                        self.read_change(entry, file, &mut problems);
                    }
                }
            }
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(ScenarioError(problems))
        }
    }

    fn read_change(&self, entry: &Entry, file: &Path, problems: &mut Vec<String>) -> Option<Manifests> {
        match read_manifest_file(&self.file(file)) {
            Ok(manifests) => Some(manifests),
            Err(ScenarioError(found)) => {
                problems.push(entry.problem(format!("`{}` can't be used:", file.display())));
                problems.extend(found);
                None
            }
        }
    }
}

/// Reads one manifest file.
///
/// # Errors
/// The file can't be read, or what is wrong in it.
pub(crate) fn read_manifest_file(path: &Path) -> Result<Manifests, ScenarioError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| ScenarioError(vec![format!("can't read `{}`: {error}", path.display())]))?;
    read_manifest_text(&path.display().to_string(), &text)
}

/// Reads the text of a manifest file called `name`.
///
/// # Errors
/// What is wrong in it.
pub(crate) fn read_manifest_text(name: &str, text: &str) -> Result<Manifests, ScenarioError> {
    manifest::read_str(name, text)
        .map_err(|errors| ScenarioError(errors.iter().map(ToString::to_string).collect()))
}

/// Pods and Services that a probe may name.
#[derive(Default)]
struct Names {
    pods: BTreeSet<String>,
    services: BTreeSet<String>,
}

impl Names {
    fn add(&mut self, manifests: &Manifests) {
        for object in super::object::objects(manifests) {
            match object.kind.as_str() {
                "Pod" => self.pods.insert(object.key()),
                "Service" => self.services.insert(object.key()),
                _ => false,
            };
        }
    }

    fn check(&self, entry: &Entry, probe: &Probe, problems: &mut Vec<String>) {
        let known = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(", ");
        let mut wrong = |what: &str, name: &str, set: &BTreeSet<String>| {
            problems.push(entry.problem(format!("no {what} `{name}`; known are {}", known(set))));
        };
        if let Peer::Pod(pod) = &probe.from
            && !self.pods.contains(pod)
        {
            wrong("pod", pod, &self.pods);
        }
        match &probe.to {
            Target::Pod(pod) if !self.pods.contains(pod) => wrong("pod", pod, &self.pods),
            Target::Service(service) if !self.services.contains(service) => {
                wrong("Service", service, &self.services);
            }
            _ => {}
        }
    }
}

fn read_settings(path: &Path) -> Result<Settings, Problem> {
    let mut settings = Settings {
        nodes: 1,
        ..Settings::default()
    };
    let Some(node) = read_yaml(path)? else {
        return Ok(settings);
    };
    let fields = node.fields("scenario.yaml", &["agent", "nodes", "topology"])?;
    if let Some(nodes) = fields.get("nodes") {
        let count: u8 = nodes.parsed("nodes", "a number from 1 to 16")?;
        if !(1..=MAX_NODES).contains(&usize::from(count)) {
            return Err(nodes.problem(format_args!(
                "`nodes` is `{count}`; it must be from 1 to {MAX_NODES}"
            )));
        }
        settings.nodes = count;
    }
    if let Some(topology) = fields.get("topology") {
        settings.topology = match topology.text("topology")? {
            "ptp" => Topology::Ptp,
            "bridge" => Topology::Bridge,
            other => {
                return Err(
                    topology.problem(format_args!("`topology` is `{other}`; it must be ptp or bridge"))
                );
            }
        };
    }
    if let Some(agent) = fields.get("agent") {
        for (key, value) in agent.map("`agent`")? {
            let flag = AgentFlag {
                key: key.text("a flag of the agent")?.to_owned(),
                value: flag_value(value)?,
                file: key.file.clone(),
                line: key.line,
            };
            settings.agent.push(flag);
        }
    }
    Ok(settings)
}

/// A list becomes a comma-separated value, as the agent's flags have it.
fn flag_value(node: &yaml::Node) -> Result<String, Problem> {
    match &node.value {
        yaml::Value::List(items) => {
            let texts: Result<Vec<_>, _> = items.iter().map(|item| item.text("a flag's value")).collect();
            Ok(texts?.join(","))
        }
        _ => node.text("a flag's value").map(str::to_owned),
    }
}

/// `None` if the file isn't there or is empty.
fn read_yaml(path: &Path) -> Result<Option<yaml::Node>, Problem> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(Problem {
                file: path.into(),
                line: 1,
                text: format!("can't be read: {error}"),
            });
        }
    };
    yaml::parse(path, &text)
}
