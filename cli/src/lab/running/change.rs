//! Changes of a running lab.
//!
//! Invariant: what can't be built leaves everything as it was; a change that is done is enforced by every
//! agent.

use super::{ENFORCED_WITHIN, Lab, Pod, start_server};
use crate::lab::model::Model;
use crate::lab::object::Object;

/// What a change does to pods.
struct Difference {
    gone: Vec<Pod>,
    new: Vec<Pod>,
    /// Same place, other words.
    changed: Vec<Pod>,
}

impl Lab {
    /// Applies objects and waits until they are enforced.
    ///
    /// # Errors
    /// What is wrong with them, or who doesn't enforce them.
    pub(crate) async fn apply(&mut self, objects: &[Object]) -> anyhow::Result<()> {
        let mut model = self.model.clone();
        model.add(objects)?;
        let versions = self.control_plane.schedule(objects, &mut model).await?;
        let difference = Difference::between(&self.model, &model, objects);
        self.change_pods(model, &difference).await?;
        let versions = self.control_plane.apply(objects, &self.model, versions).await?;
        self.load_services().await?;
        self.wait_enforced(versions, ENFORCED_WITHIN).await
    }

    /// Deletes objects and waits until none is enforced any more.
    ///
    /// # Errors
    /// Who still enforces one.
    pub(crate) async fn delete(&mut self, objects: &[Object]) -> anyhow::Result<()> {
        let mut model = self.model.clone();
        for object in objects {
            model.remove(object);
        }
        let difference = Difference::between(&self.model, &model, objects);
        self.change_pods(model, &difference).await?;
        let versions = self.control_plane.delete(objects, &self.model).await?;
        self.load_services().await?;
        self.wait_enforced(versions, ENFORCED_WITHIN).await
    }

    /// Removed pods go first: one that comes may have the address of one that went.
    async fn change_pods(&mut self, model: Model, difference: &Difference) -> anyhow::Result<()> {
        for pod in &difference.gone {
            self.servers.stop(&pod.key());
            if let Some(agent) = self.agents.get_mut(pod.node)
                && !pod.host_network
            {
                agent.delete(pod).await?;
            }
            self.network.remove_pod(&pod.key())?;
        }
        self.model = model;
        let guests: Vec<&Pod> = difference.new.iter().filter(|pod| !pod.host_network).collect();
        self.network.add_pods(&guests)?;
        for pod in difference.new.iter().chain(&difference.changed) {
            start_server(&mut self.servers, &self.network, pod)?;
        }
        let told: Vec<Pod> = difference
            .new
            .iter()
            .chain(&difference.changed)
            .cloned()
            .collect();
        self.register(&told).await
    }
}

impl Difference {
    fn between(before: &Model, after: &Model, objects: &[Object]) -> Self {
        let moved = |old: &Pod, new: &Pod| {
            old.node != new.node || old.host_network != new.host_network || old.addresses != new.addresses
        };
        let mut difference = Self {
            gone: Vec::new(),
            new: Vec::new(),
            changed: Vec::new(),
        };
        for (key, old) in &before.pods {
            match after.pods.get(key) {
                None => difference.gone.push(old.clone()),
                Some(new) if moved(old, new) => {
                    difference.gone.push(old.clone());
                    difference.new.push(new.clone());
                }
                Some(new) if old != new || in_changed_namespace(new, objects) => {
                    difference.changed.push(new.clone());
                }
                Some(_) => {}
            }
        }
        let fresh = after
            .pods
            .iter()
            .filter(|(key, _)| !before.pods.contains_key(*key));
        difference.new.extend(fresh.map(|(_, pod)| pod.clone()));
        difference
    }
}

/// A namespace's labels are told with each of its pods.
fn in_changed_namespace(pod: &Pod, objects: &[Object]) -> bool {
    objects
        .iter()
        .any(|object| object.kind == "Namespace" && object.name == pod.namespace)
}
