//! A control group for Envoy alone: what listens in it is Envoy.
//!
//! Invariant: nothing of an earlier Envoy runs in it when it is handed out.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use sha2::{Digest as _, Sha256};

use super::L7Error;

/// How long killed processes may take to go.
const PATIENCE: Duration = Duration::from_secs(2);

/// A control group.
pub(super) struct Cgroup {
    /// Its folder, for this process.
    pub(super) path: PathBuf,
    /// The file system, where it was mounted for this process alone: nobody else sees it, and it goes with it.
    _mount: Option<OwnedFd>,
}

/// The one of the Envoy whose folder this is, empty.
pub(super) fn make(folder: &Path) -> Result<Cgroup, L7Error> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| L7Error::Cgroup { path, source }
    };
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(failed(folder))?;
    let (root, mount) = match mounted(&mounts) {
        Some(root) => (root, None),
        None => {
            let mount = mounted_here().map_err(failed(folder))?;
            (format!("/proc/self/fd/{}", mount.as_raw_fd()).into(), Some(mount))
        }
    };
    let digest = Sha256::digest(folder.as_os_str().as_bytes());
    let name: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let group = root.join(format!("thyra-envoy-{name}"));
    match fs::create_dir(&group) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => empty(&group),
        made => made,
    }
    .map_err(failed(&group))?;
    Ok(Cgroup {
        path: group,
        _mount: mount,
    })
}

/// The second version without a place in the tree (fsmount(2), Linux 5.2).
fn mounted_here() -> io::Result<OwnedFd> {
    let context = fsopen("cgroup2", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    Ok(fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )?)
}

/// Takes an empty one away.
pub(super) fn remove(group: &Path) -> io::Result<()> {
    fs::remove_dir(group)
}

/// Ends what an earlier agent left there (`cgroup.kill`, Linux 5.14).
fn empty(group: &Path) -> io::Result<()> {
    fs::write(group.join("cgroup.kill"), "1")?;
    let begun = Instant::now();
    while !fs::read_to_string(group.join("cgroup.procs"))?.is_empty() {
        if begun.elapsed() > PATIENCE {
            return Err(io::Error::other("what runs in it doesn't end"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Where the second version is mounted so that groups can be made, by the table of mounts; a container's is read-only.
fn mounted(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (place, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        let writable = options.split(',').any(|option| option == "rw");
        // A place with a space is written otherwise; nobody mounts it there.
        (kind == "cgroup2" && writable && !place.contains('\\')).then(|| PathBuf::from(place))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_version_is_found_beside_the_first() {
        let both = "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n\
                    cgroup2 /sys/fs/cgroup/unified cgroup2 rw,nosuid 0 0\n";
        assert_eq!(mounted(both), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mounted("proc /proc proc rw 0 0\n"), None);
        let container = "cgroup /sys/fs/cgroup cgroup2 ro,nosuid,nodev,noexec,relatime 0 0\n";
        assert_eq!(mounted(container), None, "nobody could make one there");
    }
}
