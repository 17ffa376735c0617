//! The `bpf(2)` commands that aya has no call for: link information, batches, a map of maps.
//!
//! Invariant: every pointer handed to the kernel is to memory that outlives the call and is as long as the
//! kernel is told.
//!
//! Layouts: `union bpf_attr` and `struct bpf_link_info` of
//! <https://github.com/torvalds/linux/blob/v6.6/include/uapi/linux/bpf.h>. The kernel takes a prefix of the
//! union (the rest counts as zero), so each command's struct ends after its last field.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

const BPF_MAP_CREATE: i64 = 0;
const BPF_MAP_UPDATE_ELEM: i64 = 2;
const BPF_OBJ_GET: i64 = 7;
const BPF_OBJ_GET_INFO_BY_FD: i64 = 15;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: i64 = 21;
const BPF_MAP_LOOKUP_BATCH: i64 = 24;
const BPF_LINK_UPDATE: i64 = 29;
const BPF_LINK_DETACH: i64 = 34;

const BPF_NOEXIST: u64 = 1;
/// <https://github.com/torvalds/linux/blob/v6.6/include/uapi/asm-generic/socket.h>
const SO_NETNS_COOKIE: libc::c_int = 71;

const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_ARRAY_OF_MAPS: u32 = 12;
const BPF_LINK_TYPE_CGROUP: u32 = 3;
const BPF_LINK_TYPE_TCX: u32 = 11;

/// What the kernel says about a tcx link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkInfo {
    /// Id of the program that the link runs.
    pub(crate) program: u32,
    /// The interface; 0 once it is gone.
    pub(crate) ifindex: u32,
}

/// A map whose only entry is another map; writing it waits until every running program has ended.
#[derive(Debug)]
pub(crate) struct MapOfMaps {
    outer: OwnedFd,
    inner: OwnedFd,
}

#[repr(C)]
#[derive(FromZeros, IntoBytes, Immutable, KnownLayout)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
}

#[repr(C)]
#[derive(FromZeros, IntoBytes, Immutable, KnownLayout)]
struct Element {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(FromZeros, IntoBytes, Immutable, KnownLayout)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(FromZeros, IntoBytes, Immutable, KnownLayout)]
struct ObjectGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
#[derive(FromZeros, IntoBytes, Immutable, KnownLayout)]
struct ObjectInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The head of `struct bpf_link_info` with the members of a tcx link.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
struct TcxLink {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    ifindex: u32,
    attach_type: u32,
}

/// The same with the members of a link at a control group.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
struct CgroupLink {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    cgroup: u64,
    attach_type: u32,
    end: u32,
}

#[repr(C)]
#[derive(FromZeros, IntoBytes, Immutable, KnownLayout)]
struct LinkDetach {
    link_fd: u32,
}

#[repr(C)]
#[derive(FromZeros, IntoBytes, Immutable, KnownLayout)]
struct LinkUpdate {
    link_fd: u32,
    new_program_fd: u32,
    flags: u32,
    old_program_fd: u32,
}

/// Where a walk over a hash map stands; a fresh one starts at the beginning.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cursor(Option<u32>);

impl MapOfMaps {
    pub(crate) fn create() -> io::Result<Self> {
        let inner = create(&Create {
            map_type: BPF_MAP_TYPE_ARRAY,
            key_size: 4,
            value_size: 8,
            max_entries: 1,
            map_flags: 0,
            inner_map_fd: 0,
        })?;
        let outer = create(&Create {
            map_type: BPF_MAP_TYPE_ARRAY_OF_MAPS,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
            map_flags: 0,
            inner_map_fd: number(inner.as_fd()),
        })?;
        Ok(Self { outer, inner })
    }

    /// Writes the entry. The kernel returns only after an RCU grace period:
    /// `maybe_wait_bpf_programs` in <https://github.com/torvalds/linux/blob/v6.6/kernel/bpf/syscall.c>.
    pub(crate) fn write(&self) -> io::Result<()> {
        let key = 0_u32;
        let value = number(self.inner.as_fd());
        let mut attr = Element {
            map_fd: number(self.outer.as_fd()),
            pad: 0,
            key: address(&raw const key),
            value: address(&raw const value),
            flags: 0,
        };
        // SAFETY: key and value are 4 bytes long, as this map was created, and live past the call.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }
}

/// Asks a pinned tcx link for its program and interface.
pub(crate) fn link_info(pin: &Path) -> io::Result<LinkInfo> {
    let info: TcxLink = info_of(pin)?;
    if info.kind != BPF_LINK_TYPE_TCX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a tcx link"));
    }
    Ok(LinkInfo {
        program: info.program,
        ifindex: info.ifindex,
    })
}

/// The number of the control group that a pinned link is at; 0 once it has gone.
pub(crate) fn link_cgroup(pin: &Path) -> io::Result<u64> {
    let info: CgroupLink = info_of(pin)?;
    if info.kind != BPF_LINK_TYPE_CGROUP {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "not a link at a control group",
        ));
    }
    Ok(info.cgroup)
}

/// What the kernel says of a pinned link, in the first bytes of `struct bpf_link_info`.
fn info_of<T: FromBytes>(pin: &Path) -> io::Result<T> {
    let link = object_get(pin)?;
    let mut info = T::new_zeroed();
    let mut attr = ObjectInfo {
        bpf_fd: number(link.as_fd()),
        info_len: length(size_of::<T>()),
        info: address(&raw mut info),
    };
    // SAFETY: the kernel writes at most `info_len` bytes into `info`, which lives past the call and takes any bytes.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// Takes a pinned link's program off its interface at once. Removing the pin alone would do so too, but only
/// after an RCU grace period. A link whose interface is gone is fine.
pub(crate) fn link_detach(pin: &Path) -> io::Result<()> {
    let link = object_get(pin)?;
    let mut attr = LinkDetach {
        link_fd: number(link.as_fd()),
    };
    // SAFETY: the command reads nothing but the attribute itself.
    match unsafe { bpf(BPF_LINK_DETACH, &mut attr) } {
        Err(e) if e.raw_os_error() != Some(libc::ENOLINK) => Err(e),
        _ => Ok(()),
    }
}

/// Puts another program into a pinned link, between two packets. False when what it was attached to is gone.
pub(crate) fn link_update(pin: &Path, program: BorrowedFd<'_>) -> io::Result<bool> {
    let link = object_get(pin)?;
    let mut attr = LinkUpdate {
        link_fd: number(link.as_fd()),
        new_program_fd: number(program),
        flags: 0,
        old_program_fd: 0,
    };
    // SAFETY: the command reads nothing but the attribute itself.
    match unsafe { bpf(BPF_LINK_UPDATE, &mut attr) } {
        Err(e) if e.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
        done => done.map(|_| true),
    }
}

/// The number that a network namespace has as long as the machine runs (`SO_NETNS_COOKIE`, Linux 5.14), of the one
/// that `socket` was made in.
pub(crate) fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut bytes = libc::socklen_t::try_from(size_of::<u64>()).expect("eight");
    // SAFETY: the kernel writes at most `bytes` bytes into `cookie`, which lives past the call.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut bytes,
        )
    };
    if done == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Reads up to `keys.len()` entries of a hash map from `cursor` on. Returns how many were read and where to
/// go on; no cursor means that the walk is over.
pub(crate) fn lookup_batch<const K: usize, const V: usize>(
    map: BorrowedFd<'_>,
    cursor: Cursor,
    keys: &mut [[u8; K]],
    values: &mut [[u8; V]],
) -> io::Result<(usize, Option<Cursor>)> {
    assert_eq!(keys.len(), values.len(), "a value for each key");
    let start = cursor.0.unwrap_or(0);
    let mut next = 0_u32;
    let mut attr = Batch {
        in_batch: if cursor.0.is_some() {
            address(&raw const start)
        } else {
            0
        },
        out_batch: address(&raw mut next),
        keys: address(keys.as_mut_ptr()),
        values: address(values.as_mut_ptr()),
        count: length(keys.len()),
        map_fd: number(map),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: a hash map's position is a u32; keys and values hold `count` elements of the map's sizes,
    // which `Flows` checks when it opens the map.
    let done = unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) };
    let read = usize::try_from(attr.count).unwrap_or(0).min(keys.len());
    match done {
        Ok(_) => Ok((read, Some(Cursor(Some(next))))),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok((read, None)),
        Err(e) => Err(e),
    }
}

/// Takes one entry out of a hash map; none when it is not there any more.
pub(crate) fn take<const K: usize, const V: usize>(
    map: BorrowedFd<'_>,
    key: &[u8; K],
) -> io::Result<Option<[u8; V]>> {
    let mut value = [0_u8; V];
    let mut attr = Element {
        map_fd: number(map),
        pad: 0,
        key: address(key.as_ptr()),
        value: address(value.as_mut_ptr()),
        flags: 0,
    };
    // SAFETY: key and value have the map's sizes (checked when it was opened) and live past the call.
    match unsafe { bpf(BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attr) } {
        Ok(_) => Ok(Some(value)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Puts an entry into a hash map unless the key is there already.
pub(crate) fn insert_new<const K: usize, const V: usize>(
    map: BorrowedFd<'_>,
    key: &[u8; K],
    value: &[u8; V],
) -> io::Result<()> {
    let mut attr = Element {
        map_fd: number(map),
        pad: 0,
        key: address(key.as_ptr()),
        value: address(value.as_ptr()),
        flags: BPF_NOEXIST,
    };
    // SAFETY: key and value have the map's sizes (checked when it was opened) and live past the call.
    match unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) } {
        Err(e) if e.raw_os_error() != Some(libc::EEXIST) => Err(e),
        _ => Ok(()),
    }
}

fn object_get(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attr = ObjectGet {
        pathname: address(path.as_ptr()),
        bpf_fd: 0,
        file_flags: 0,
    };
    // SAFETY: `path` is a C string that lives past the call.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut attr) }?;
    // SAFETY: the kernel returned a new file descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn create(wanted: &Create) -> io::Result<OwnedFd> {
    let mut attr = Create { ..*wanted };
    // SAFETY: the command reads nothing but the attribute itself.
    let fd = unsafe { bpf(BPF_MAP_CREATE, &mut attr) }?;
    // SAFETY: the kernel returned a new file descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
///
/// Pointers in `attr` must be valid for what `command` reads and writes there.
unsafe fn bpf<T: IntoBytes>(command: i64, attr: &mut T) -> io::Result<i32> {
    // SAFETY: `attr` is as long as said; its pointers are the caller's word.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    i32::try_from(result)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(io::Error::last_os_error)
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).expect("an open file descriptor is not negative")
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("a batch is far below 4 GiB")
}

fn address<T>(pointer: *const T) -> u64 {
    u64::try_from(pointer.expose_provenance()).expect("an address has 64 bits at most")
}
