//! One packet: a message as JSON, and descriptors as SCM_RIGHTS.
//!
//! The socket is SOCK_SEQPACKET, so the kernel keeps the borders of messages and delivers a
//! message with its descriptors or not at all.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes in a packet at most: far above any message, far below the socket's buffer.
pub const PACKET_BYTES_MAX: usize = 64 * 1024;

/// Descriptors in a packet at most: an armed pager sends two.
pub const DESCRIPTORS_MAX: usize = 4;

/// What one receive brought.
pub(crate) enum Arrival<M> {
    /// A message and its descriptors.
    Message(M, Vec<OwnedFd>),
    /// None is waiting (or the socket's time-out has passed).
    Nothing,
    /// The other side has closed, or died.
    Closed,
}

pub(crate) fn send<M: Serialize>(
    socket: impl AsFd,
    message: &M,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > PACKET_BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "a message of {} bytes and {} descriptors is over the limit of {PACKET_BYTES_MAX} \
                 bytes and {DESCRIPTORS_MAX} descriptors",
                bytes.len(),
                descriptors.len()
            ),
        ));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        let fits = ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        assert!(fits, "the space is made for as many descriptors as were just checked");
    }
    rustix::io::retry_on_intr(|| {
        // NOSIGNAL: a peer that died is an error to handle, not a SIGPIPE in the pager.
        rustix::net::sendmsg(
            socket.as_fd(),
            &[IoSlice::new(&bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
    })?;
    Ok(())
}

/// Receives into `buffer`, which has [`PACKET_BYTES_MAX`] bytes.
pub(crate) fn receive<M: DeserializeOwned>(
    socket: impl AsFd,
    buffer: &mut [u8],
) -> io::Result<Arrival<M>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut next = || {
        rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(
                socket.as_fd(),
                &mut [IoSliceMut::new(buffer)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            )
        })
    };
    let received = match next() {
        // The peer closed without reading everything: told once, and before the peer's last words.
        Err(rustix::io::Errno::CONNRESET) => next(),
        other => other,
    };
    let received = match received {
        Ok(received) => received,
        Err(rustix::io::Errno::AGAIN) => return Ok(Arrival::Nothing),
        Err(rustix::io::Errno::CONNRESET) => return Ok(Arrival::Closed),
        Err(errno) => return Err(errno.into()),
    };
    // Taken out at once: whatever is wrong with the message, no descriptor stays open.
    let descriptors: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 {
        return Ok(Arrival::Closed);
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "a packet has more than {PACKET_BYTES_MAX} bytes or {DESCRIPTORS_MAX} descriptors, or there \
                 is no room for its descriptors (`ulimit -n`)"
            ),
        ));
    }
    let message = serde_json::from_slice(&buffer[..received.bytes])?;
    Ok(Arrival::Message(message, descriptors))
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::PagerMessage;

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    }

    fn receive_pager(socket: &OwnedFd) -> io::Result<Arrival<PagerMessage>> {
        receive(socket, &mut vec![0; PACKET_BYTES_MAX])
    }

    #[test]
    fn a_message_arrives_with_its_descriptors_and_not_with_those_of_the_next() {
        let (a, b) = pair();
        let (pipe_read, pipe_write) = rustix::pipe::pipe().unwrap();
        send(&a, &PagerMessage::Armed, &[pipe_read.as_fd(), pipe_write.as_fd()]).unwrap();
        send(&a, &PagerMessage::Bye, &[]).unwrap();
        drop((pipe_read, pipe_write));
        let Arrival::Message(PagerMessage::Armed, descriptors) = receive_pager(&b).unwrap() else {
            panic!("not what was sent");
        };
        assert_eq!(descriptors.len(), 2);
        rustix::io::write(&descriptors[1], b"x").unwrap();
        assert_eq!(rustix::io::read(&descriptors[0], &mut [0; 4]).unwrap(), 1);
        let Arrival::Message(PagerMessage::Bye, descriptors) = receive_pager(&b).unwrap() else {
            panic!("not what was sent");
        };
        assert!(descriptors.is_empty());
        assert!(matches!(receive_pager(&b).unwrap(), Arrival::Nothing));
        drop(a);
        assert!(matches!(receive_pager(&b).unwrap(), Arrival::Closed));
    }

    #[test]
    fn the_last_words_of_a_peer_that_did_not_listen_are_heard() {
        let (a, b) = pair();
        send(&b, &PagerMessage::Armed, &[]).unwrap();
        send(&a, &PagerMessage::Bye, &[]).unwrap();
        drop(a);
        let Arrival::Message(PagerMessage::Bye, _) = receive_pager(&b).unwrap() else {
            panic!("not what was sent");
        };
        assert!(matches!(receive_pager(&b).unwrap(), Arrival::Closed));
    }

    #[test]
    fn what_is_no_message_is_an_error_and_leaks_no_descriptor() {
        let (a, b) = pair();
        let (pipe_read, pipe_write) = rustix::pipe::pipe().unwrap();
        send(&a, &"no such message", &[pipe_write.as_fd()]).unwrap();
        drop(pipe_write);
        assert!(receive_pager(&b).is_err());
        // The last writer is gone, so the pipe is at its end: the duplicate was closed.
        assert_eq!(rustix::io::read(&pipe_read, &mut [0; 4]).unwrap(), 0);
    }

    #[test]
    fn an_oversized_message_is_refused_by_the_sender() {
        let (a, _b) = pair();
        let message = "x".repeat(PACKET_BYTES_MAX);
        let refused = send(&a, &PagerMessage::Fatal { message, exit_code: 125 }, &[]);
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
