//! The programs: loading, pinning, attaching at a host interface, replacing under traffic.
//!
//! Invariant: a link is pinned before it counts as attached, so it outlives this process; a program in a
//! pinned link is replaced by one kernel operation, between two packets.

use std::io;
use std::path::Path;

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions};
use aya::programs::{LinkOrder, Program, ProgramError, ProgramInfo, SchedClassifier, SkLookup, SockOps};
use aya::{Ebpf, EbpfError, EbpfLoader};
use thyra_datapath_abi::maps;

use crate::bpffs::{self, Direction, Pins};
use crate::clsact;
use crate::direct::LocalRedirect;
use crate::hook::{self, Attachment, Hook, Order};
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
}

impl Variant {
    pub(crate) const ALL: [Self; 2] = [Self::Plain, Self::Direct];

    pub(crate) const fn program(self, direction: Direction) -> &'static str {
        match (self, direction) {
            (Self::Plain, _) => direction.program(),
            (Self::Direct, Direction::To) => maps::TO_POD_DIRECT,
            (Self::Direct, Direction::From) => maps::FROM_POD_DIRECT,
        }
    }

    /// All that are pinned.
    const fn names(self) -> [&'static str; 5] {
        let [to_pod, from_pod] = [self.program(Direction::To), self.program(Direction::From)];
        [from_pod, to_pod, maps::STEER, maps::REGISTER, maps::FROM_AGENT]
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

/// The loaded programs.
#[derive(Debug)]
pub(crate) struct Programs {
    to_pod: SchedClassifier,
    from_pod: SchedClassifier,
    to_pod_id: u32,
    from_pod_id: u32,
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
        local_redirect: bool,
    ) -> Result<(Self, LocalRedirect), OpenError> {
        if !local_redirect {
            return Ok((
                Self::open_variant(object, pins, Variant::Plain)?,
                LocalRedirect::Off,
            ));
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
        let open = |direction: Direction| {
            let name = variant.program(direction);
            let refused = |source| OpenError::Program { name, source };
            let program = SchedClassifier::from_pin(pins.program(&object.content, name)).map_err(refused)?;
            let id = program.info().map_err(refused)?.id();
            Ok::<_, OpenError>((program, id))
        };
        let (to_pod, to_pod_id) = open(Direction::To)?;
        let (from_pod, from_pod_id) = open(Direction::From)?;
        let path = |name| pins.program(&object.content, name);
        let refused = |name| move |source| OpenError::Program { name, source };
        Ok(Self {
            steer: SkLookup::from_pin(path(maps::STEER)).map_err(refused(maps::STEER))?,
            content: object.content.clone(),
            register: SockOps::from_pin(path(maps::REGISTER)).map_err(refused(maps::REGISTER))?,
            to_pod,
            from_pod,
            to_pod_id,
            from_pod_id,
        })
    }

    /// The kernel's id of a program.
    pub(crate) fn id(&self, direction: Direction) -> u32 {
        match direction {
            Direction::To => self.to_pod_id,
            Direction::From => self.from_pod_id,
        }
    }

    /// Attaches so that it stays when this process ends. A filter always comes first.
    pub(crate) fn attach(
        &mut self,
        made: &Attachment,
        interface: &Interface,
        order: Order,
    ) -> Result<(), HookError> {
        match made.hook() {
            Hook::Tcx => self.attach_link(made.direction, interface, &made.path, order),
            Hook::Clsact => self.attach_filter(made.direction, interface, &made.path),
        }
    }

    fn attach_link(
        &mut self,
        direction: Direction,
        interface: &Interface,
        pin: &Path,
        order: Order,
    ) -> Result<(), HookError> {
        let program = self.program(direction);
        let refused = |source| HookError::attach(direction, interface, source);
        let options = TcAttachOptions::TcxOrder(match order {
            Order::First => LinkOrder::first(),
            Order::Last => LinkOrder::last(),
        });
        let id = program
            .attach_with_options(&interface.name, hook::attach_type(direction), options)
            .map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        let unusable = |source| HookError::link(pin, source);
        let link = FdLink::try_from(link).map_err(unusable)?;
        link.pin(pin)
            .map(drop)
            .map_err(|source| HookError::pin(pin, source))
    }

    /// A filter of an earlier build is replaced between two packets; a new one is taken away again unless its pin
    /// gets into place.
    fn attach_filter(
        &mut self,
        direction: Direction,
        interface: &Interface,
        pin: &Path,
    ) -> Result<(), HookError> {
        let refused = |source| HookError::attach(direction, interface, source);
        let failed = |source| refused(ProgramError::IOError(source));
        clsact::prepare(interface).map_err(failed)?;
        let there = clsact::ours(interface.index, direction).map_err(failed)?;
        let program = self.program(direction);
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
            return self.pin_filter(direction, interface, pin);
        }
        // The name may have gone to another interface meanwhile.
        let here = clsact::ours(interface.index, direction).map_err(failed)?;
        if here.is_none() {
            return Err(failed(io::Error::other("its name went to another interface")));
        }
        self.pin_filter(direction, interface, pin)?;
        std::mem::forget(filter);
        Ok(())
    }

    /// Renamed into its place, so that a filter that is replaced never goes without a pin.
    fn pin_filter(
        &mut self,
        direction: Direction,
        interface: &Interface,
        pin: &Path,
    ) -> Result<(), HookError> {
        let failed = |source| HookError::attach(direction, interface, ProgramError::IOError(source));
        let beside = pin.with_file_name(bpffs::UNFINISHED);
        bpffs::unpin(&beside).map_err(|e| failed(io::Error::other(e)))?;
        self.program(direction)
            .pin(&beside)
            .map_err(|source| HookError::pin(&beside, source))?;
        std::fs::rename(&beside, pin).map_err(failed)
    }

    /// Puts the current program in the place of the one that is attached.
    pub(crate) fn replace(&mut self, attachment: &Attachment, ifindex: u32) -> Result<(), HookError> {
        let (direction, pin) = (attachment.direction, attachment.path.as_path());
        let refused = |source| HookError::Replace {
            pin: pin.display().to_string(),
            source,
        };
        if attachment.hook() == Hook::Clsact {
            let interface = Interface::by_index(ifindex);
            return match interface.map_err(|e| refused(ProgramError::IOError(e)))? {
                Some(interface) => self.attach_filter(direction, &interface, pin),
                // Its filter went with it.
                None => Ok(()),
            };
        }
        let unusable = |source| HookError::link(pin, source);
        let link = FdLink::from(PinnedLink::from_pin(pin).map_err(unusable)?);
        let link = SchedClassifierLink::try_from(link).map_err(unusable)?;
        let program = self.program(direction);
        let id = program.attach_to_link(link).map_err(refused)?;
        // Closes this process's descriptor; the pin holds the link.
        program.take_link(id).map(drop).map_err(refused)
    }

    /// Whether our program is the first at the interface; an earlier one could hide packets.
    pub(crate) fn is_first(
        &self,
        hook: Hook,
        direction: Direction,
        interface: &Interface,
    ) -> Result<bool, ProgramError> {
        let chain = match SchedClassifier::query_tcx(interface.name.as_str(), hook::attach_type(direction)) {
            Ok((_, chain)) => chain,
            // A kernel without tcx has nothing there.
            Err(_) if hook == Hook::Clsact => Vec::new(),
            Err(error) => return Err(error),
        };
        match hook {
            Hook::Tcx => Ok(chain
                .first()
                .is_some_and(|first| first.id() == self.id(direction))),
            Hook::Clsact => Ok(chain.is_empty()
                && clsact::is_first(interface.index, direction).map_err(ProgramError::IOError)?),
        }
    }

    fn program(&mut self, direction: Direction) -> &mut SchedClassifier {
        match direction {
            Direction::To => &mut self.to_pod,
            Direction::From => &mut self.from_pod,
        }
    }
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
    let mut loader = EbpfLoader::new();
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
