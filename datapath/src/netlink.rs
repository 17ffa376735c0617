//! Dumps over netlink, for what no library of ours reads.
//!
//! Invariant: a message that is cut short is an error, never half an answer.

use std::io;

use netlink_sys::Socket;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NLM_F_REQUEST | NLM_F_ROOT | NLM_F_MATCH`.
const DUMP: u16 = 0x1 | 0x300;
/// Flags in an attribute's type.
const TYPE_MASK: u16 = 0x3fff;

/// `struct nlmsghdr`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Header {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

/// `struct nlattr`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
struct AttributeHeader {
    length: u16,
    kind: u16,
}

/// Asks for a dump in this thread's network namespace; `each` gets the body of every answer.
///
/// # Errors
/// The kernel refuses, or breaks the dump off.
pub(crate) fn dump<T: IntoBytes + Immutable>(
    protocol: isize,
    kind: u16,
    message: &T,
    each: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    dump_on(&Socket::new(protocol)?, kind, message, each)
}

/// The same on a socket that exists, in the network namespace that it was made in.
///
/// # Errors
/// As `dump`.
pub(crate) fn dump_on<T: IntoBytes + Immutable>(
    socket: &Socket,
    kind: u16,
    message: &T,
    each: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let header = Header {
        length: u32::try_from(size_of::<Header>() + size_of::<T>()).map_err(io::Error::other)?,
        kind,
        flags: DUMP,
        sequence: 1,
        port: 0,
    };
    socket.send(&[header.as_bytes(), message.as_bytes()].concat(), 0)?;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        if !messages(&bytes, each)? {
            return Ok(());
        }
    }
}

/// Reads one datagram of a dump; whether more follow.
pub(crate) fn messages(mut bytes: &[u8], each: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<bool> {
    while !bytes.is_empty() {
        let (header, _) = Header::read_from_prefix(bytes).map_err(|_| cut_short())?;
        let length = usize::try_from(header.length).map_err(|_| cut_short())?;
        let body = bytes.get(size_of::<Header>()..length).ok_or_else(cut_short)?;
        match header.kind {
            // Bears an error too, when the dump was broken off.
            NLMSG_DONE | NLMSG_ERROR => {
                let (code, _) = i32::read_from_prefix(body).map_err(|_| cut_short())?;
                return match code {
                    0.. if header.kind == NLMSG_DONE => Ok(false),
                    _ => Err(io::Error::from_raw_os_error(code.saturating_neg())),
                };
            }
            _ => each(body)?,
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

/// The value of the first attribute of a kind.
pub(crate) fn attribute(mut bytes: &[u8], kind: u16) -> io::Result<Option<&[u8]>> {
    while !bytes.is_empty() {
        let (header, _) = AttributeHeader::read_from_prefix(bytes).map_err(|_| cut_short())?;
        let length = usize::from(header.length);
        let value = bytes
            .get(size_of::<AttributeHeader>()..length)
            .ok_or_else(cut_short)?;
        if header.kind & TYPE_MASK == kind {
            return Ok(Some(value));
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(None)
}

/// What a message is that ends too early.
pub(crate) fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is cut short")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_is_cut_short_is_an_error() {
        let mut none = |_: &[u8]| Ok(());
        assert!(messages(&[20, 0, 0, 0, 20, 0], &mut none).is_err());
        assert!(messages(&[0xff; 40], &mut none).is_err());
        assert!(attribute(&[3, 0, 1, 0], 1).is_err());
        assert!(attribute(&[9, 0, 1, 0, 7], 1).is_err());
    }

    #[test]
    fn a_dump_that_was_broken_off_is_an_error() {
        let mut none = |_: &[u8]| Ok(());
        let done = |code: i32| {
            let header = [20, 0, 0, 0, 3, 0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0];
            [&header[..], &code.to_ne_bytes()].concat()
        };
        assert!(!messages(&done(0), &mut none).unwrap());
        let refused = messages(&done(-libc::EOPNOTSUPP), &mut none).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EOPNOTSUPP));
    }

    #[test]
    fn attributes_are_found_past_their_padding() {
        let bytes = [5, 0, 1, 0, 7, 0, 0, 0, 8, 0, 11, 0, 1, 2, 3, 4];
        assert_eq!(attribute(&bytes, 11).unwrap(), Some(&[1, 2, 3, 4][..]));
        assert_eq!(attribute(&bytes, 1).unwrap(), Some(&[7][..]));
        assert_eq!(attribute(&bytes, 2).unwrap(), None);
    }
}
