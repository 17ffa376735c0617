//! EndpointService: pods come and go through here.
//!
//! Invariant: a request is checked before anything is touched; the answer comes after the store's.

use thyra_proto::thyra::v1 as api;
use thyra_proto::thyra::v1::endpoint_service_server::EndpointService;
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use crate::admin::detail;
use crate::registration::{BadRegistration, Registration};
use crate::store::{Command, EndpointError, Handle, PodKey, SharedPlane};

/// The service.
#[derive(Clone)]
pub struct Endpoints {
    /// Who does it.
    pub handle: Handle,
    /// Counters.
    pub plane: SharedPlane,
}

impl Endpoints {
    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, EndpointError>>) -> Command,
    ) -> Result<T, Status> {
        let stopping = || Status::unavailable("the agent is stopping");
        let (reply, answer) = oneshot::channel();
        if !self.handle.send(command(reply)) {
            return Err(stopping());
        }
        Ok(answer.await.map_err(|_| stopping())??)
    }
}

impl From<EndpointError> for Status {
    fn from(error: EndpointError) -> Self {
        let text = error.to_string();
        match error {
            EndpointError::Full(_) => Self::resource_exhausted(text),
            EndpointError::Precondition(_) => Self::failed_precondition(text),
            EndpointError::Unknown(_) => Self::not_found(text),
            EndpointError::Failed(_) => Self::internal(text),
        }
    }
}

fn registration(endpoint: Option<api::Endpoint>) -> Result<Box<Registration>, Status> {
    let read = endpoint
        .ok_or(BadRegistration::Empty)
        .and_then(Registration::try_from);
    read.map(Box::new)
        .map_err(|e| Status::invalid_argument(e.to_string()))
}

#[tonic::async_trait]
impl EndpointService for Endpoints {
    async fn add(&self, request: Request<api::AddRequest>) -> Result<Response<api::AddResponse>, Status> {
        let registration = registration(request.into_inner().endpoint)?;
        let added = self.ask(|reply| Command::Add(registration, reply)).await?;
        let (id, generation) = (u32::from(added.id), u64::from(added.generation));
        Ok(Response::new(api::AddResponse { id, generation }))
    }

    async fn del(&self, request: Request<api::DelRequest>) -> Result<Response<api::DelResponse>, Status> {
        let api::DelRequest {
            pod_uid,
            namespace,
            name,
        } = request.into_inner();
        let key = match (pod_uid.is_empty(), namespace.is_empty() || name.is_empty()) {
            (false, _) => PodKey::Uid(pod_uid),
            (true, false) => PodKey::Name(namespace, name),
            (true, true) => {
                return Err(Status::invalid_argument(
                    "`pod_uid`, or `namespace` and `name`, must be given",
                ));
            }
        };
        let generation = self.ask(|reply| Command::Del(key, reply)).await?;
        Ok(Response::new(api::DelResponse {
            generation: u64::from(generation),
        }))
    }

    async fn check(
        &self,
        request: Request<api::CheckRequest>,
    ) -> Result<Response<api::CheckResponse>, Status> {
        let registration = registration(request.into_inner().endpoint)?;
        let generation = self.ask(|reply| Command::Check(registration, reply)).await?;
        Ok(Response::new(api::CheckResponse {
            generation: u64::from(generation),
        }))
    }

    async fn list(&self, _: Request<api::ListRequest>) -> Result<Response<api::ListResponse>, Status> {
        let this = self.clone();
        let list =
            tokio::task::spawn_blocking(move || detail::all(&this.handle.snapshot(), &this.plane)).await;
        let endpoints = list.map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(api::ListResponse { endpoints }))
    }
}
