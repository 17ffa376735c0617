//! Where the pins lie, and what may be removed there.
//!
//! ```text
//! <bpffs dir>/<layout>/<map name>              the maps
//! <bpffs dir>/<layout>/program-<content>-<name> the programs of the object with that content
//! <bpffs dir>/<layout>/link-<endpoint id>-{to,from}
//! <bpffs dir>/<layout>/filter-<endpoint id>-{to,from}-<interface index>
//! <bpffs dir>/<layout>/inside-<endpoint id>    the link at the pod's own end of the veth
//! <bpffs dir>/<layout>/steer-<endpoint id>     the link in the pod's network namespace
//! <bpffs dir>/<layout>/envoy                   the link at Envoy's control group
//! ```
//!
//! Invariant: only names of these shapes are ever removed, links first: no program runs without its maps.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock, statfs};
use thyra_datapath_abi::maps;

use crate::hook;
use crate::sys;

/// `BPF_FS_MAGIC`: <https://github.com/torvalds/linux/blob/v6.6/include/uapi/linux/magic.h>.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// A pin that is about to get its name.
pub(crate) const UNFINISHED: &str = "unfinished";
/// The link at Envoy's control group.
const ENVOY: &str = "envoy";

/// Which way packets of a link go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Direction {
    /// To the pod: egress of the host end.
    To,
    /// From the pod: ingress of the host end.
    From,
}

impl Direction {
    pub(crate) const BOTH: [Self; 2] = [Self::From, Self::To];

    /// Name of the program that judges this direction.
    pub(crate) const fn program(self) -> &'static str {
        match self {
            Self::To => maps::TO_POD,
            Self::From => maps::FROM_POD,
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::To => "to",
            Self::From => "from",
        }
    }
}

/// One layout's folder of pins.
#[derive(Clone, Debug)]
pub(crate) struct Pins {
    dir: PathBuf,
}

/// A pin by what its name says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Pin {
    Link(u16, Direction),
    /// The program of a clsact filter, at the interface with this index.
    Filter(u16, Direction, u32),
    /// The link at the pod's own end of the veth.
    Inside(u16),
    /// The link in the network namespace of an endpoint.
    Steer(u16),
    /// The link at Envoy's control group.
    Envoy,
    Program {
        content: String,
    },
    Map,
}

/// The right to write to the pins below a folder; held until it is dropped or the process ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _folder: File,
}

/// Why the folder can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BpffsError {
    /// The folder is not on a BPF file system.
    #[error(
        "`{0}` is not on a BPF file system; mount one: `mount -t bpf bpf /sys/fs/bpf`, or name a folder on one"
    )]
    NotMounted(PathBuf),
    /// Another process works with the same pins.
    #[error("the pins in `{0}` are in use by another agent; stop it, or name another folder")]
    InUse(PathBuf),
    /// A file operation failed.
    #[error("can't {action} `{path}`")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl BpffsError {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

impl Lock {
    /// Takes the folder `base`, which must exist.
    pub(crate) fn take(base: &Path) -> Result<Self, BpffsError> {
        let folder = File::open(base).map_err(|e| BpffsError::io("open", base, e))?;
        match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _folder: folder }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(BpffsError::InUse(base.to_owned())),
            Err(e) => Err(BpffsError::io("lock", base, e.into())),
        }
    }
}

/// Makes `base` and says clearly when it is not on a BPF file system.
pub(crate) fn prepare(base: &Path) -> Result<(), BpffsError> {
    let existing = base.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    if !is_bpffs(existing).map_err(|e| BpffsError::io("read the file system of", existing, e))? {
        return Err(BpffsError::NotMounted(base.to_owned()));
    }
    std::fs::create_dir_all(base).map_err(|e| BpffsError::io("make", base, e))
}

/// Whether `path` lies on a BPF file system.
pub(crate) fn is_bpffs(path: &Path) -> io::Result<bool> {
    Ok(u64::try_from(statfs(path)?.f_type).is_ok_and(|magic| magic == BPF_FS_MAGIC))
}

/// The layouts that have pins below `base`.
pub(crate) fn layouts(base: &Path) -> Result<Vec<Pins>, BpffsError> {
    let mut found: Vec<Pins> = names(base)?
        .into_iter()
        .filter(|name| name.len() == 16 && name.bytes().all(|b| b.is_ascii_hexdigit()))
        .map(|name| Pins { dir: base.join(name) })
        .collect();
    found.sort_by(|a, b| a.dir.cmp(&b.dir));
    Ok(found)
}

impl Pins {
    pub(crate) fn new(base: &Path, layout: &str) -> Self {
        Self {
            dir: base.join(layout),
        }
    }

    /// Those in the folder `dir`.
    pub(crate) fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn program(&self, content: &str, name: &str) -> PathBuf {
        self.dir.join(format!("program-{content}-{name}"))
    }

    pub(crate) fn link(&self, endpoint: u16, direction: Direction) -> PathBuf {
        self.dir.join(format!("link-{endpoint}-{}", direction.word()))
    }

    pub(crate) fn filter(&self, endpoint: u16, direction: Direction, ifindex: u32) -> PathBuf {
        self.dir
            .join(format!("filter-{endpoint}-{}-{ifindex}", direction.word()))
    }

    pub(crate) fn inside(&self, endpoint: u16) -> PathBuf {
        self.dir.join(format!("inside-{endpoint}"))
    }

    pub(crate) fn steer(&self, endpoint: u16) -> PathBuf {
        self.dir.join(format!("steer-{endpoint}"))
    }

    pub(crate) fn envoy(&self) -> PathBuf {
        self.dir.join(ENVOY)
    }

    /// All pins of known names, links first, then programs, then maps.
    pub(crate) fn list(&self) -> Result<Vec<(Pin, PathBuf)>, BpffsError> {
        let mut pins: Vec<_> = names(&self.dir)?
            .into_iter()
            .filter_map(|name| Some((parse(&name)?, self.dir.join(name))))
            .collect();
        pins.sort();
        Ok(pins)
    }

    /// Removes all pins and the folder.
    pub(crate) fn remove(&self) -> Result<(), BpffsError> {
        for attachment in hook::attachments(self)? {
            attachment.remove()?;
        }
        for (pin, path) in self.list()? {
            match pin {
                Pin::Inside(_) | Pin::Steer(_) | Pin::Envoy => unlink(&path)?,
                _ => unpin(&path)?,
            }
        }
        unpin(&self.dir.join(UNFINISHED))?;
        match std::fs::remove_dir(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(BpffsError::io("remove", &self.dir, e)),
            _ => Ok(()),
        }
    }
}

/// Takes a link's program off its interface and removes the pin; one that is gone already is fine.
pub(crate) fn unlink(path: &Path) -> Result<(), BpffsError> {
    match sys::link_detach(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(BpffsError::io("detach", path, e)),
        _ => unpin(path),
    }
}

/// Removes a pin; one that is gone already is fine.
pub(crate) fn unpin(path: &Path) -> Result<(), BpffsError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(BpffsError::io("remove", path, e)),
        _ => Ok(()),
    }
}

fn parse(name: &str) -> Option<Pin> {
    if maps::ALL.contains(&name) {
        return Some(Pin::Map);
    }
    if name == ENVOY {
        return Some(Pin::Envoy);
    }
    if let Some(rest) = name.strip_prefix("program-") {
        let (content, _) = rest.split_once('-')?;
        return Some(Pin::Program {
            content: content.to_owned(),
        });
    }
    if let Some(endpoint) = name.strip_prefix("inside-") {
        return Some(Pin::Inside(endpoint.parse().ok()?));
    }
    if let Some(endpoint) = name.strip_prefix("steer-") {
        return Some(Pin::Steer(endpoint.parse().ok()?));
    }
    let direction = |word: &str| Direction::BOTH.into_iter().find(|d| d.word() == word);
    if let Some(rest) = name.strip_prefix("filter-") {
        let (endpoint, rest) = rest.split_once('-')?;
        let (word, ifindex) = rest.split_once('-')?;
        return Some(Pin::Filter(
            endpoint.parse().ok()?,
            direction(word)?,
            ifindex.parse().ok()?,
        ));
    }
    let (endpoint, word) = name.strip_prefix("link-")?.split_once('-')?;
    Some(Pin::Link(endpoint.parse().ok()?, direction(word)?))
}

fn names(dir: &Path) -> Result<Vec<String>, BpffsError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(BpffsError::io("list", dir, e)),
    };
    entries
        // A name that isn't text is not one of ours.
        .filter_map(|entry| entry.map(|e| e.file_name().into_string().ok()).transpose())
        .collect::<io::Result<_>>()
        .map_err(|e| BpffsError::io("list", dir, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_names_are_pins() {
        assert_eq!(parse("link-12-to"), Some(Pin::Link(12, Direction::To)));
        assert_eq!(parse("link-12-from"), Some(Pin::Link(12, Direction::From)));
        assert_eq!(parse("filter-12-to-7"), Some(Pin::Filter(12, Direction::To, 7)));
        assert_eq!(parse("inside-12"), Some(Pin::Inside(12)));
        assert_eq!(parse("BANKS"), Some(Pin::Map));
        assert_eq!(
            parse("program-0f-to_pod"),
            Some(Pin::Program { content: "0f".into() })
        );
        for foreign in [
            "link-12",
            "link-x-to",
            "link-1-up",
            "cilium_lxc",
            "link-70000-to",
            "filter-1-to",
            "filter-1-to-x",
            "program-x",
        ] {
            assert_eq!(parse(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn links_are_removed_before_programs_and_maps() {
        let mut pins = [
            Pin::Map,
            Pin::Program { content: "a".into() },
            Pin::Link(3, Direction::From),
        ];
        pins.sort();
        assert!(matches!(pins[0], Pin::Link(..)) && pins[2] == Pin::Map);
    }

    #[test]
    fn a_folder_elsewhere_is_refused_with_the_mend() {
        let refused = prepare(Path::new("/proc/nothing")).unwrap_err();
        assert!(refused.to_string().contains("mount -t bpf bpf"), "{refused}");
    }
}
