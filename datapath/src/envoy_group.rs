//! A control group for Envoy alone: what listens in it is Envoy, and what runs in it ends with enforcement.
//!
//! Invariant: only groups of this module's own names are ever emptied or removed.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// How a group's name begins.
const PREFIX: &str = "thyra-envoy-";
/// How long killed processes may take to go.
const PATIENCE: Duration = Duration::from_secs(2);

/// The group can't be had, or not be emptied.
#[derive(Debug, thiserror::Error)]
#[error("can't use the control group `{}` for envoy", path.display())]
pub struct EnvoyGroupError {
    /// Its folder, or that of the Envoy that it is for.
    pub path: PathBuf,
    /// Why not.
    pub source: io::Error,
}

/// A control group of an Envoy.
#[derive(Debug)]
pub struct EnvoyGroup {
    path: PathBuf,
    /// The file system, where it was mounted for this process alone: nobody else sees it, and it goes with it.
    _mount: Option<OwnedFd>,
}

impl EnvoyGroup {
    /// The one of the Envoy whose folder this is, with whatever an earlier agent left running there.
    ///
    /// # Errors
    /// There are no control groups of the second version here, or it can't be made.
    pub fn make(folder: &Path) -> Result<Self, EnvoyGroupError> {
        let (root, mount) = root().map_err(failed(folder))?;
        let path = root.join(name(folder));
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed(&path)(error)),
            _ => Ok(Self { path, _mount: mount }),
        }
    }

    /// The same, if an earlier agent made it.
    ///
    /// # Errors
    /// There are no control groups of the second version here.
    pub fn find(folder: &Path) -> Result<Option<Self>, EnvoyGroupError> {
        let (root, mount) = root().map_err(failed(folder))?;
        let path = root.join(name(folder));
        Ok(path.is_dir().then_some(Self { path, _mount: mount }))
    }

    /// The one that the kernel numbers so; none when it has gone or is not Envoy's.
    ///
    /// # Errors
    /// The groups can't be listed.
    pub(crate) fn numbered(id: u64) -> Result<Option<Self>, EnvoyGroupError> {
        let (root, mount) = root().map_err(failed(Path::new("/")))?;
        for entry in fs::read_dir(&root).map_err(failed(&root))? {
            let entry = entry.map_err(failed(&root))?;
            if entry.file_name().as_bytes().starts_with(PREFIX.as_bytes()) && entry.ino() == id {
                return Ok(Some(Self {
                    path: entry.path(),
                    _mount: mount,
                }));
            }
        }
        Ok(None)
    }

    /// Its folder, for this process.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether nothing runs in it; `false` also where that can't be read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.procs")).is_ok_and(|all| all.is_empty())
    }

    /// Ends what runs in it (`cgroup.kill`, Linux 5.14), and waits for that.
    ///
    /// # Errors
    /// It doesn't end.
    pub fn empty(&self) -> Result<(), EnvoyGroupError> {
        let failed = failed(&self.path);
        fs::write(self.path.join("cgroup.kill"), "1").map_err(&failed)?;
        let begun = Instant::now();
        while !self.is_empty() {
            if begun.elapsed() > PATIENCE {
                return Err(failed(io::Error::other("what runs in it doesn't end")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Takes it away; what runs in it keeps it.
    ///
    /// # Errors
    /// Something runs in it.
    pub fn remove(self) -> Result<(), EnvoyGroupError> {
        fs::remove_dir(&self.path).map_err(failed(&self.path))
    }
}

/// The number that the kernel has for the group with this folder (the inode of its folder, kernfs).
pub(crate) fn number(folder: &fs::File) -> io::Result<u64> {
    Ok(folder.metadata()?.ino())
}

fn failed(path: &Path) -> impl Fn(io::Error) -> EnvoyGroupError {
    let path = path.to_owned();
    move |source| EnvoyGroupError {
        path: path.clone(),
        source,
    }
}

fn name(folder: &Path) -> String {
    // FNV-1a: a name, nothing to be safe from.
    let bytes = folder.as_os_str().as_bytes();
    let digest = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{PREFIX}{digest:016x}")
}

/// Where groups are made.
fn root() -> io::Result<(PathBuf, Option<OwnedFd>)> {
    if let Some(root) = mounted(&fs::read_to_string("/proc/self/mounts")?) {
        return Ok((root, None));
    }
    let mount = mounted_here()?;
    Ok((path_of(&mount), Some(mount)))
}

/// The second version without a place in the tree (fsmount(2), Linux 5.2).
pub(crate) fn mounted_here() -> io::Result<OwnedFd> {
    let context = fsopen("cgroup2", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    Ok(fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )?)
}

/// Where such a one is, for this process.
pub(crate) fn path_of(mount: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", mount.as_raw_fd()).into()
}

/// Where the second version is mounted, by the table of mounts.
pub(crate) fn mounts(mounts: &str) -> Vec<PathBuf> {
    all(mounts).map(|(place, _)| place.into()).collect()
}

/// Places of the second version, with their options.
fn all(mounts: &str) -> impl Iterator<Item = (&str, &str)> {
    mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (place, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        // A place with a space is written otherwise; nobody mounts it there.
        (kind == "cgroup2" && !place.contains('\\')).then_some((place, options))
    })
}

/// Where the second version is mounted so that groups can be made, by the table of mounts; a container's is read-only.
fn mounted(mounts: &str) -> Option<PathBuf> {
    let mut writable = all(mounts).filter(|(_, options)| options.split(',').any(|option| option == "rw"));
    writable.next().map(|(place, _)| place.into())
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
