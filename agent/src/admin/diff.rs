//! What a change of policies would change on this node: verdicts, and the connections that are open right now.
//!
//! Invariant: nothing is enforced, and the change is compiled by the same compiler as what is.

use std::net::IpAddr;

use thyra_datapath::{Connection, Phase};
use thyra_datapath_abi::tables::Tables;
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::diff::{self, Side};
use thyra_policy_compiler::manifest::{self, Body, ManifestError, Manifests};
use thyra_policy_compiler::world::World;
use thyra_policy_compiler::{explain, matrix};
use thyra_proto::thyra::v1 as api;
use tonic::Status;

use crate::snapshot::Snapshot;
use crate::store::{SharedPlane, lock};

/// The answer.
///
/// # Errors
/// INVALID_ARGUMENT with all that is wrong with the change; FAILED_PRECONDITION before the first commit or when
/// the changed tables would not fit.
pub(super) fn diff(
    snapshot: &Snapshot,
    plane: &SharedPlane,
    request: &api::DiffRequest,
) -> Result<api::DiffResponse, Status> {
    if snapshot.tables.classes.is_empty() {
        return Err(Status::failed_precondition(
            "no tables were compiled yet; ask again when `thyra status` shows a generation",
        ));
    }
    let world = changed(&snapshot.held.world, request)?;
    let compiled = Compiler::new().compile(&world);
    let tables = compiled.map_err(|e| Status::failed_precondition(format!("the change is refused: {e}")))?;
    let sides = [
        Side {
            world: &snapshot.held.world,
            tables: &snapshot.tables,
        },
        Side {
            world: &world,
            tables: &tables,
        },
    ];
    let found = diff::diff(sides[0], sides[1], |_, _| {});
    let mut response = api::DiffResponse {
        changes: found.changes.into_iter().map(change).collect(),
        ..api::DiffResponse::default()
    };
    connections(snapshot, plane, &tables, &mut response);
    Ok(response)
}

/// The world with the change.
fn changed(world: &World, request: &api::DiffRequest) -> Result<World, Status> {
    let (come, go) = (read("apply", &request.apply)?, read("delete", &request.delete)?);
    if come.objects.is_empty() && go.objects.is_empty() {
        return Err(Status::invalid_argument("the change holds no policy"));
    }
    let mut world = world.clone();
    let gone = policies(&go)?;
    let mut removed = 0;
    for reference in gone.authorization.keys() {
        let known = world.authorization.remove(reference).is_some();
        removed += usize::from(known | world.unreadable.remove(reference).is_some());
    }
    for reference in gone.peer_authentication.keys() {
        removed += usize::from(world.peer_authentication.remove(reference).is_some());
    }
    for reference in gone.request_authentication.keys() {
        removed += usize::from(world.request_authentication.remove(reference).is_some());
    }
    if removed == 0 && !go.objects.is_empty() {
        return Err(Status::invalid_argument(
            "this node knows none of the policies to delete",
        ));
    }
    let more = policies(&come)?;
    for reference in more.authorization.keys() {
        world.unreadable.remove(reference);
    }
    world.authorization.extend(more.authorization);
    world.peer_authentication.extend(more.peer_authentication);
    world.request_authentication.extend(more.request_authentication);
    Ok(world)
}

/// A world of nothing but policies.
fn policies(manifests: &Manifests) -> Result<World, Status> {
    manifest::world(manifests, Default::default()).map_err(|e| Status::invalid_argument(e.to_string()))
}

fn read(name: &str, text: &str) -> Result<Manifests, Status> {
    let joined = |errors: Vec<ManifestError>| {
        let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        Status::invalid_argument(texts.join("\n"))
    };
    let manifests = manifest::read_str(name, text).map_err(joined)?;
    let is_policy = |body: &Body| {
        matches!(
            body,
            Body::AuthorizationPolicy(_) | Body::PeerAuthentication(_) | Body::RequestAuthentication(_)
        )
    };
    match manifests.objects.iter().find(|object| !is_policy(&object.body)) {
        Some(other) => Err(Status::invalid_argument(format!(
            "`{}` is a {}: a live node is asked about policies; for the rest compare files \
             (`--manifests DIR`)",
            other.name, other.kind
        ))),
        None => Ok(manifests),
    }
}

fn change(change: diff::Change) -> api::DiffChange {
    api::DiffChange {
        endpoint: change.endpoint,
        before: change.before.name().to_owned(),
        after: change.after.name().to_owned(),
        ports: explain::ports(&change.runs, matrix::ANY_PORT),
        family: u32::from(change.family),
        why: change.why,
        sources: change.sources,
    }
}

/// Adds the open connections whose fate changes.
fn connections(snapshot: &Snapshot, plane: &SharedPlane, after: &Tables, response: &mut api::DiffResponse) {
    for (id, registration) in &snapshot.held.registrations {
        let held = lock::read(plane).connections(*id, registration);
        match held {
            Ok(held) => {
                let changed = held.iter().filter_map(|c| turned(snapshot, after, *id, c));
                response.connections.extend(changed);
            }
            Err(error) => response.notes.push(format!(
                "the connections of `{}` can't be read: {error}",
                registration.pod()
            )),
        }
    }
    response
        .connections
        .sort_by(|a, b| (&a.to, &a.source).cmp(&(&b.to, &b.source)));
}

/// A connection whose fate changes: one that the pod accepted, or one that it tries to open to another pod here.
fn turned(
    snapshot: &Snapshot,
    after: &Tables,
    id: u16,
    connection: &Connection,
) -> Option<api::DiffConnection> {
    let (source, destination, endpoint) = if connection.accepted {
        (connection.remote, connection.local, id)
    } else if connection.phase == Phase::Opening {
        let other = local_endpoint(snapshot, connection.remote.ip())?;
        (connection.local, connection.remote, other)
    } else {
        return None;
    };
    let (old, new) = (
        snapshot.tables.judge(endpoint, source.ip(), destination.port())?,
        after.judge(endpoint, source.ip(), destination.port())?,
    );
    let (before, fate) = (matrix::fate(old), matrix::fate(new));
    let name = |address: IpAddr| {
        let owner = snapshot.owner(address);
        owner.map_or_else(
            || address.to_string(),
            |(namespace, name)| format!("{namespace}/{name}"),
        )
    };
    (before != fate).then(|| api::DiffConnection {
        from: name(source.ip()),
        to: name(destination.ip()),
        source: source.to_string(),
        destination: destination.to_string(),
        before: before.name().to_owned(),
        after: fate.name().to_owned(),
        why: explain::text(new),
    })
}

fn local_endpoint(snapshot: &Snapshot, address: IpAddr) -> Option<u16> {
    let mut registrations = snapshot.held.registrations.iter();
    let found = registrations.find(|(_, registration)| registration.addresses.contains(&address));
    found.map(|(id, _)| *id)
}
