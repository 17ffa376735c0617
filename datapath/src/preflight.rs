//! What a machine must have before the programs can be loaded.

use std::path::{Path, PathBuf};

use rustix::system::uname;
use rustix::thread::{CapabilitySet, capabilities};

use crate::beside;
use crate::bpffs::{self, BpffsError};
use crate::direct;
use crate::hook::Hook;
use crate::object::{ObjectError, ShippedObject};

/// Array elements larger than 4 MiB came with 6.0; 6.1 is the oldest that is tested.
const OLDEST_KERNEL: (u32, u32) = (6, 1);
const BTF: &str = "/sys/kernel/btf/vmlinux";
const NEEDED: [(CapabilitySet, &str); 3] = [
    (CapabilitySet::BPF, "CAP_BPF"),
    (CapabilitySet::PERFMON, "CAP_PERFMON"),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
];

/// One requirement and what was found.
#[derive(Debug)]
pub struct Check {
    /// What is required.
    pub name: &'static str,
    /// What was found, or what is missing and how to mend it.
    pub outcome: Result<String, PreflightError>,
}

/// A requirement is not met.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// The programs are not in this build.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The kernel lacks what the tables need.
    #[error("kernel `{found}` is too old: the tables need 6.1 or later")]
    KernelTooOld {
        /// Release of the running kernel.
        found: String,
    },
    /// The kernel was built without type information.
    #[error("the kernel has no BTF (`{BTF}` is missing); use a kernel with `CONFIG_DEBUG_INFO_BTF=y`")]
    NoBtf,
    /// The process may not load programs.
    #[error("not permitted to load BPF programs: {} missing; run as root", missing.join(", "))]
    NotPermitted {
        /// Names of the missing capabilities.
        missing: Vec<&'static str>,
    },
    /// The capabilities of this process can't be read.
    #[error("can't read this process's capabilities")]
    Capabilities(#[source] rustix::io::Errno),
    /// The folder for the pins can't be used.
    #[error(transparent)]
    Bpffs(#[from] BpffsError),
}

/// Checks everything that `Datapath::open` needs, in its order; changes nothing.
#[must_use]
pub fn preflight(bpffs: &Path) -> Vec<Check> {
    vec![
        Check {
            name: "programs",
            outcome: programs(),
        },
        Check {
            name: "capabilities",
            outcome: permitted(),
        },
        Check {
            name: "kernel",
            outcome: kernel(),
        },
        Check {
            name: "btf",
            outcome: btf(),
        },
        Check {
            name: "bpffs",
            outcome: folder(bpffs),
        },
        Check {
            name: "hook",
            outcome: Ok(beside::preflight()),
        },
        Check {
            name: "local redirect",
            outcome: Ok(direct::preflight()),
        },
    ]
}

fn programs() -> Result<String, PreflightError> {
    let object = ShippedObject::read()?;
    Ok(format!("built in, layout `{}`", object.layout))
}

fn permitted() -> Result<String, PreflightError> {
    let held = capabilities(None)
        .map_err(PreflightError::Capabilities)?
        .effective;
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|(capability, _)| !held.contains(*capability))
        .map(|(_, name)| *name)
        .collect();
    // CAP_SYS_ADMIN stands for the first two, CAP_NET_ADMIN has no stand-in.
    let enough = held.contains(CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN);
    if missing.is_empty() || enough {
        Ok("may load BPF programs".to_owned())
    } else {
        Err(PreflightError::NotPermitted { missing })
    }
}

fn kernel() -> Result<String, PreflightError> {
    let found = uname().release().to_string_lossy().into_owned();
    if release(&found).is_some_and(|version| version >= OLDEST_KERNEL) {
        let hook = match Hook::newest() {
            Hook::Tcx => "tcx links",
            Hook::Clsact => "filters of a clsact qdisc (tcx links need 6.6)",
        };
        Ok(format!("{found}: {hook}"))
    } else {
        Err(PreflightError::KernelTooOld { found })
    }
}

/// Major and minor number.
pub(crate) fn release(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn btf() -> Result<String, PreflightError> {
    if Path::new(BTF).exists() {
        Ok(BTF.to_owned())
    } else {
        Err(PreflightError::NoBtf)
    }
}

fn folder(base: &Path) -> Result<String, PreflightError> {
    let existing = base.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    match bpffs::is_bpffs(existing) {
        Ok(true) => Ok(base.display().to_string()),
        Ok(false) => Err(BpffsError::NotMounted(PathBuf::from(base)).into()),
        Err(e) => Err(BpffsError::io("read the file system of", existing, e).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hook::TCX_KERNEL;

    #[test]
    fn releases_compare_as_numbers() {
        assert_eq!(release("6.18.44-fc-v445"), Some((6, 18)));
        assert_eq!(release("6.6-rc1"), Some((6, 6)));
        assert!(release("6.18").unwrap() > TCX_KERNEL);
        assert!(release("6.1.0-44-cloud").unwrap() < TCX_KERNEL);
        assert!(release("6.1.0-44-cloud").unwrap() >= OLDEST_KERNEL);
        assert!(release("5.15.0").unwrap() < OLDEST_KERNEL);
        assert_eq!(release("unknown"), None);
    }

    #[test]
    fn a_folder_that_is_no_bpffs_is_named() {
        let bad = preflight(Path::new("/proc"))
            .into_iter()
            .find(|c| c.name == "bpffs")
            .unwrap();
        assert!(bad.outcome.unwrap_err().to_string().contains("/proc"));
    }
}
