//! The programs: loading, pinning, attaching at a host interface, replacing under traffic.
//!
//! Invariant: a link is pinned before it counts as attached, so it outlives this process; a program in a
//! pinned link is replaced by one kernel operation, between two packets.

use std::io;
use std::path::Path;

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions};
use aya::programs::{
    LinkOrder, Program, ProgramError, ProgramInfo, SchedClassifier, SkLookup, SockOps, TcAttachType,
};
use aya::{Ebpf, EbpfError, EbpfLoader};
use thyra_datapath_abi::maps;

use crate::bpffs::{self, Direction, Pins};
use crate::clsact;
use crate::direct::LocalRedirect;
use crate::hook::{self, Attachment, Hook, Order, Place, Role};
use crate::inside;
use crate::interface::Interface;
use crate::object::ShippedObject;
use crate::open::OpenError;

/// Which programs are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variant {
    /// All packets go through the stack.
    Plain,
    /// `Config::local_redirect`.
    Direct,
    /// `Place::Pod`.
    Inside,
}

impl Variant {
    pub(crate) const ALL: [Self; 2] = [Self::Plain, Self::Direct];

    pub(crate) const fn program(self, direction: Direction) -> &'static str {
        match (self, direction) {
            (Self::Plain | Self::Inside, _) => direction.program(),
            (Self::Direct, Direction::To) => maps::TO_POD_DIRECT,
            (Self::Direct, Direction::From) => maps::FROM_POD_DIRECT,
        }
    }

    /// All that are pinned.
    fn names(self) -> Vec<&'static str> {
        let [to_pod, from_pod] = [self.program(Direction::To), self.program(Direction::From)];
        let mut names = vec![from_pod, to_pod, maps::STEER, maps::REGISTER, maps::FROM_AGENT];
        if self == Self::Inside {
            names.extend([maps::ORIGIN, maps::TO_POD_INSIDE]);
        }
        names
    }
}

/// Whether a program has this name and puts packets straight into pods.
pub(crate) fn is_direct(name: &str) -> bool {
    [maps::TO_POD_DIRECT, maps::FROM_POD_DIRECT].contains(&name)
}

/// Without the verifier's log.
fn in_short(error: &ProgramError) -> String {
    match error {
        ProgramError::LoadError { io_error, .. } => io_error.to_string(),
        other => other.to_string(),
    }
}

/// A program at interfaces, with the kernel's id of it.
#[derive(Debug)]
struct Judge {
    program: SchedClassifier,
    id: u32,
}

/// The loaded programs.
#[derive(Debug)]
pub(crate) struct Programs {
    to_pod: Judge,
    from_pod: Judge,
    /// Of `Place::Pod` alone.
    origin: Option<Judge>,
    pub(crate) steer: SkLookup,
    pub(crate) register: SockOps,
    /// Of the object that they are of.
    pub(crate) content: String,
}

/// A link could not be made, pinned or given another program.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The kernel refused the program at the interface.
    #[error("can't attach `{program}` to `{interface}`")]
    Attach {
        /// Which program.
        program: &'static str,
        /// Where.
        interface: String,
        /// Why not.
        #[source]
        source: ProgramError,
    },
    /// The link could not be pinned.
    #[error("can't pin the link `{pin}`")]
    Pin {
        /// Path of the pin.
        pin: String,
        /// Why not.
        #[source]
        source: aya::pin::PinError,
    },
    /// The pinned link can't be used.
    #[error("the pinned link `{pin}` can't be used")]
    Link {
        /// Path of the pin.
        pin: String,
        /// Why not.
        #[source]
        source: LinkError,
    },
    /// The pinned link's program could not be replaced.
    #[error("can't replace the program of the pinned link `{pin}`")]
    Replace {
        /// Path of the pin.
        pin: String,
        /// Why not.
        #[source]
        source: ProgramError,
    },
}

impl HookError {
    fn attach(direction: Direction, interface: &Interface, source: ProgramError) -> Self {
        Self::Attach {
            program: direction.program(),
            interface: interface.name.clone(),
            source,
        }
    }

    fn replace(pin: &Path, source: ProgramError) -> Self {
        Self::Replace {
            pin: pin.display().to_string(),
            source,
        }
    }

    fn link(pin: &Path, source: LinkError) -> Self {
        Self::Link {
            pin: pin.display().to_string(),
            source,
        }
    }

    fn pin(pin: &Path, source: aya::pin::PinError) -> Self {
        Self::Pin {
            pin: pin.display().to_string(),
            source,
        }
    }
}

impl Programs {
    /// Makes the maps and programs that are not pinned yet, and opens the programs: those of `Config::local_redirect`
    /// where it is wanted, unless this kernel refuses them.
    pub(crate) fn open(
        object: &ShippedObject,
        pins: &Pins,
        (local_redirect, place): (bool, Place),
    ) -> Result<(Self, LocalRedirect), OpenError> {
        if !local_redirect {
            let variant = match place {
                Place::Host => Variant::Plain,
                Place::Pod => Variant::Inside,
            };
            return Ok((Self::open_variant(object, pins, variant)?, LocalRedirect::Off));
        }
        match Self::open_variant(object, pins, Variant::Direct) {
            Ok(programs) => Ok((programs, LocalRedirect::On)),
            Err(OpenError::Program { name, source }) if is_direct(name) => {
                let why = format!("the kernel refuses `{name}`: {}", in_short(&source));
                let programs = Self::open_variant(object, pins, Variant::Plain)?;
                Ok((programs, LocalRedirect::Refused(why)))
            }
            Err(error) => Err(error),
        }
    }

    fn open_variant(object: &ShippedObject, pins: &Pins, variant: Variant) -> Result<Self, OpenError> {
        let stale = |name: &&str| !is_current(object, pins, name);
        let missing: Vec<_> = variant.names().into_iter().filter(stale).collect();
        if !missing.is_empty() || object.maps.iter().any(|map| !pins.map(&map.name).exists()) {
            let mut ebpf = load(object, pins)?;
            for name in missing {
                pin(&mut ebpf, name, &pins.program(&object.content, name))?;
            }
        }
        let open = |name: &'static str| {
            let refused = |source| OpenError::Program { name, source };
            let program = SchedClassifier::from_pin(pins.program(&object.content, name)).map_err(refused)?;
            let id = program.info().map_err(refused)?.id();
            Ok::<_, OpenError>(Judge { program, id })
        };
        if variant == Variant::Inside {
            inside::enter(&open(maps::TO_POD_INSIDE)?.program, &pins.map(maps::INSIDE))?;
        }
        let path = |name| pins.program(&object.content, name);
        let refused = |name| move |source| OpenError::Program { name, source };
        Ok(Self {
            steer: SkLookup::from_pin(path(maps::STEER)).map_err(refused(maps::STEER))?,
            content: object.content.clone(),
            register: SockOps::from_pin(path(maps::REGISTER)).map_err(refused(maps::REGISTER))?,
            to_pod: open(variant.program(Direction::To))?,
            from_pod: open(variant.program(Direction::From))?,
            origin: match variant {
                Variant::Inside => Some(open(maps::ORIGIN)?),
                Variant::Plain | Variant::Direct => None,
            },
        })
    }

    /// Whether what comes to a pod is judged at the pod's own end.
    pub(crate) const fn are_inside(&self) -> bool {
        self.origin.is_some()
    }

    /// The kernel's id of a program.
    pub(crate) fn id(&self, role: Role) -> u32 {
        self.judge(role).id
    }

    /// Attaches so that it stays when this process ends. A filter always comes first.
    pub(crate) fn attach(
        &mut self,
        (made, role): (&Attachment, Role),
        interface: &Interface,
        order: Order,
    ) -> Result<(), HookError> {
        match made.hook() {
            Hook::Tcx => self.attach_link(role, interface, &made.path, order),
            Hook::Clsact => self.attach_filter(role, interface, &made.path),
        }
    }

    fn attach_link(
        &mut self,
        role: Role,
        interface: &Interface,
        pin: &Path,
        order: Order,
    ) -> Result<(), HookError> {
        let at = (role.program(), hook::attach_type(role.direction()));
        link(self.program(role), interface, at, order, pin)
    }

    /// A filter of an earlier build is replaced between two packets; a new one is taken away again unless its pin
    /// gets into place.
    fn attach_filter(&mut self, role: Role, interface: &Interface, pin: &Path) -> Result<(), HookError> {
        let direction = role.direction();
        let refused = |source| HookError::attach(direction, interface, source);
        let failed = |source| refused(ProgramError::IOError(source));
        clsact::prepare(interface).map_err(failed)?;
        let there = clsact::ours(interface.index, direction).map_err(failed)?;
        let program = self.program(role);
        let id = match there {
            Some(_) => program.attach_to_link(clsact::filter(interface, direction).map_err(failed)?),
            None => {
                let options = TcAttachOptions::Netlink(NlOptions {
                    priority: clsact::PRIORITY,
                    handle: clsact::HANDLE,
                    classid: None,
                });
                program.attach_with_options(&interface.name, hook::attach_type(direction), options)
            }
        };
        let filter = program.take_link(id.map_err(refused)?).map_err(refused)?;
        if there.is_some() {
            // It judged before and goes on, come what may.
            std::mem::forget(filter);
            return self.pin_filter(role, interface, pin);
        }
        // The name may have gone to another interface meanwhile.
        let here = clsact::ours(interface.index, direction).map_err(failed)?;
        if here.is_none() {
            return Err(failed(io::Error::other("its name went to another interface")));
        }
        self.pin_filter(role, interface, pin)?;
        std::mem::forget(filter);
        Ok(())
    }

    /// Renamed into its place, so that a filter that is replaced never goes without a pin.
    fn pin_filter(&mut self, role: Role, interface: &Interface, pin: &Path) -> Result<(), HookError> {
        let failed = |source| HookError::attach(role.direction(), interface, ProgramError::IOError(source));
        let beside = pin.with_file_name(bpffs::UNFINISHED);
        bpffs::unpin(&beside).map_err(|e| failed(io::Error::other(e)))?;
        self.program(role)
            .pin(&beside)
            .map_err(|source| HookError::pin(&beside, source))?;
        std::fs::rename(&beside, pin).map_err(failed)
    }

    /// Puts the current program in the place of the one that is attached.
    pub(crate) fn replace(
        &mut self,
        (attachment, role): (&Attachment, Role),
        ifindex: u32,
    ) -> Result<(), HookError> {
        let pin = attachment.path.as_path();
        if attachment.hook() == Hook::Clsact {
            let interface = Interface::by_index(ifindex);
            let failed = |e| HookError::replace(pin, ProgramError::IOError(e));
            return match interface.map_err(failed)? {
                Some(interface) => self.attach_filter(role, &interface, pin),
                // Its filter went with it.
                None => Ok(()),
            };
        }
        relink(self.program(role), pin)
    }

    /// Whether our program is the first at the interface; an earlier one could hide packets.
    pub(crate) fn is_first(
        &self,
        (hook, role): (Hook, Role),
        interface: &Interface,
    ) -> Result<bool, ProgramError> {
        let direction = role.direction();
        let chain = match SchedClassifier::query_tcx(interface.name.as_str(), hook::attach_type(direction)) {
            Ok((_, chain)) => chain,
            // A kernel without tcx has nothing there.
            Err(_) if hook == Hook::Clsact => Vec::new(),
            Err(error) => return Err(error),
        };
        match hook {
            Hook::Tcx => Ok(chain.first().is_some_and(|first| first.id() == self.id(role))),
            Hook::Clsact => Ok(chain.is_empty()
                && clsact::is_first(interface.index, direction).map_err(ProgramError::IOError)?),
        }
    }

    /// Without `origin` it is `to_pod`, which judges at the host end.
    fn judge(&self, role: Role) -> &Judge {
        match (role, &self.origin) {
            (Role::From, _) => &self.from_pod,
            (Role::Origin, Some(origin)) => origin,
            (Role::To | Role::Origin, _) => &self.to_pod,
        }
    }

    fn program(&mut self, role: Role) -> &mut SchedClassifier {
        let judge = match (role, &mut self.origin) {
            (Role::From, _) => &mut self.from_pod,
            (Role::Origin, Some(origin)) => origin,
            (Role::To | Role::Origin, _) => &mut self.to_pod,
        };
        &mut judge.program
    }
}

/// Links a program to an interface of this thread's network namespace, so that it stays when this process ends.
pub(crate) fn link(
    program: &mut SchedClassifier,
    interface: &Interface,
    (name, at): (&'static str, TcAttachType),
    order: Order,
    pin: &Path,
) -> Result<(), HookError> {
    let refused = |source| HookError::Attach {
        program: name,
        interface: interface.name.clone(),
        source,
    };
    let options = TcAttachOptions::TcxOrder(match order {
        Order::First => LinkOrder::first(),
        Order::Last => LinkOrder::last(),
    });
    let id = program
        .attach_with_options(&interface.name, at, options)
        .map_err(refused)?;
    let link = program.take_link(id).map_err(refused)?;
    let unusable = |source| HookError::link(pin, source);
    let link = FdLink::try_from(link).map_err(unusable)?;
    link.pin(pin)
        .map(drop)
        .map_err(|source| HookError::pin(pin, source))
}

/// Puts a program in the place of the one of a pinned link.
pub(crate) fn relink(program: &mut SchedClassifier, pin: &Path) -> Result<(), HookError> {
    let unusable = |source| HookError::link(pin, source);
    let refused = |source| HookError::replace(pin, source);
    let link = FdLink::from(PinnedLink::from_pin(pin).map_err(unusable)?);
    let link = SchedClassifierLink::try_from(link).map_err(unusable)?;
    let id = program.attach_to_link(link).map_err(refused)?;
    // Closes this process's descriptor; the pin holds the link.
    program.take_link(id).map(drop).map_err(refused)
}

/// Removes the pinned programs of other objects than `content`; no link may run them any more.
pub(crate) fn retire(pins: &Pins, content: &str) -> Result<(), bpffs::BpffsError> {
    for (pin, path) in pins.list()? {
        if matches!(&pin, bpffs::Pin::Program { content: other } if other != content) {
            bpffs::unpin(&path)?;
        }
    }
    Ok(())
}

/// Whether the pinned program of this object exists and works on the pinned maps.
fn is_current(object: &ShippedObject, pins: &Pins, name: &str) -> bool {
    let used_by_it = if name == maps::REGISTER {
        maps::L7_LISTENERS
    } else {
        maps::STATE
    };
    let state = aya::maps::MapInfo::from_pin(pins.map(used_by_it)).map(|map| map.id());
    let program = ProgramInfo::from_pin(pins.program(&object.content, name));
    let used = program.and_then(|program| program.map_ids());
    matches!((state, used), (Ok(state), Ok(Some(used))) if used.contains(&state))
}

fn load(object: &ShippedObject, pins: &Pins) -> Result<Ebpf, OpenError> {
    load_for(object, pins, 0)
}

/// With the number of the host interface that `TO_POD_ENTRY` belongs to.
pub(crate) fn load_for(object: &ShippedObject, pins: &Pins, ifindex: u32) -> Result<Ebpf, OpenError> {
    let mut loader = EbpfLoader::new();
    loader.override_global(maps::HOST_IFINDEX, &ifindex, true);
    for map in &object.maps {
        loader.map_pin_path(&map.name, pins.map(&map.name));
        loader.map_max_entries(&map.name, map.entries);
    }
    loader
        .load(object.bytes)
        .map_err(|source| match out_of_memory(&source) {
            true => OpenError::NoMemory { source },
            false => OpenError::Load { source },
        })
}

fn pin(ebpf: &mut Ebpf, name: &'static str, path: &Path) -> Result<(), OpenError> {
    let program = ebpf.program_mut(name).ok_or(OpenError::ProgramMissing(name))?;
    let loaded = match program {
        Program::SchedClassifier(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SockOps(program) => program.load(),
        _ => return Err(OpenError::ProgramMissing(name)),
    };
    loaded.map_err(|source| OpenError::Program { name, source })?;
    bpffs::unpin(path)?;
    program.pin(path).map_err(|source| OpenError::Pin {
        path: path.to_owned(),
        source,
    })
}

fn out_of_memory(error: &EbpfError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.raw_os_error() == Some(libc::ENOMEM);
        }
        cause = error.source();
    }
    false
}
