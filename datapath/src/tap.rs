//! An interface of this process's own: what the kernel sends by it is read here, what is written here it receives.
//!
//! Invariant: it goes with its descriptor. A frame is whole, with what the kernel knows of its checksum and its
//! segments in front (`struct virtio_net_hdr`,
//! <https://github.com/torvalds/linux/blob/v6.6/include/uapi/linux/virtio_net.h>).

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::interface::Interface as Link;

/// The kernel puts a number in the place of `%d`.
const NAME: &[u8] = b"thyra%d";
/// Largest frame's IP packet: the MTU that a tap takes at most.
const MTU: libc::c_int = 65_521;
/// Bytes in front of each frame.
pub const TAP_HEADER: usize = 10;

/// <https://github.com/torvalds/linux/blob/v6.6/include/uapi/linux/if_tun.h>.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const IFF_TAP: libc::c_short = 0x0002;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
/// Checksums may be left to do, and segments together: CSUM, TSO4, TSO6, TSO_ECN.
const OFFLOADS: libc::c_ulong = 0x1 | 0x2 | 0x4 | 0x8;

/// The interface.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    index: u32,
}

impl Tap {
    /// Makes one, which is down.
    pub(crate) fn make() -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        let mut request = request(NAME);
        request.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        // SAFETY: the request has the layout of this call's argument and lives past it.
        checked(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
        let size = libc::c_int::try_from(TAP_HEADER).map_err(io::Error::other)?;
        // SAFETY: the call reads an int.
        checked(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) })?;
        // SAFETY: the call takes a number.
        checked(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, OFFLOADS) })?;
        // SAFETY: the kernel wrote a name that ends in zero.
        let name = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
        let name = name.to_string_lossy().into_owned();
        let interface = Link::by_name(&name)?.ok_or_else(|| io::Error::other("it has gone"))?;
        Ok(Self {
            file,
            name,
            index: interface.index,
        })
    }

    /// Lets packets through.
    pub(crate) fn start(&self) -> io::Result<()> {
        // It has no addresses and asks for none. Where /proc can't be written, what the node says there is dropped.
        let own = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", self.name);
        let _unwritable = std::fs::write(own, "1");
        let socket = rustix::net::socket(
            rustix::net::AddressFamily::INET,
            rustix::net::SocketType::DGRAM,
            None,
        )?;
        let mut request = request(self.name.as_bytes());
        request.ifr_ifru.ifru_mtu = MTU;
        // SAFETY: the request has the layout of this call's argument and lives past it; so below.
        checked(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFMTU, &raw mut request) })?;
        let [up, no_arp] =
            [libc::IFF_UP, libc::IFF_NOARP].map(|flag| libc::c_short::try_from(flag).unwrap_or(0));
        request.ifr_ifru.ifru_flags = up | no_arp;
        // SAFETY: as above.
        checked(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its index.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The next frame, `TAP_HEADER` in front; its length.
    ///
    /// # Errors
    /// `WouldBlock` where there is none.
    pub fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(frame)
    }

    /// Gives the kernel a frame, `TAP_HEADER` first.
    ///
    /// # Errors
    /// The kernel has no memory, or doesn't like the header.
    pub fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        (&self.file).write_vectored(pieces).map(drop)
    }
}

/// An interface that is waited for; needs a tokio runtime.
#[derive(Debug)]
pub struct TapWatch(AsyncFd<Arc<Tap>>);

impl TapWatch {
    /// Waits for frames of this interface.
    ///
    /// # Errors
    /// The runtime refuses it.
    pub fn new(tap: &Arc<Tap>) -> io::Result<Self> {
        // SAFETY: the descriptor lives as long as the interface, which is shared and never gives it away.
        let watched = unsafe { AsyncFd::register_with_interest(Arc::clone(tap), Interest::READABLE) }?;
        Ok(Self(watched))
    }

    /// The next frame, `TAP_HEADER` in front; its length. One that is not waited for to the end is not lost.
    ///
    /// # Errors
    /// The interface has gone.
    pub async fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(read) = ready.try_io(|tap| tap.get_ref().read(frame)) {
                return read;
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }
}

fn request(name: &[u8]) -> libc::ifreq {
    // SAFETY: all zeros are a value of this plain struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .zip(name.iter().take(libc::IFNAMSIZ - 1))
    {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    request
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
