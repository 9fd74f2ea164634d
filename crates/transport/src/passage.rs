//! Packets and descriptors between two processes of this machine, one of which is to go on where the
//! other one stops.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, socketpair,
    sockopt,
};

/// Bytes of a packet at most.
pub const PACKET_BYTES_MAX: usize = 4096;

/// Descriptors that a packet takes along at most: half of what the kernel permits (SCM_MAX_FD).
pub const PASSED_MAX: usize = 120;

/// One end. Packets arrive whole, in their order, with the descriptors that were sent with them.
#[derive(Debug)]
pub struct Passage {
    descriptor: OwnedFd,
}

/// What has arrived.
#[derive(Debug)]
pub enum Arrival {
    /// A packet, and what came with it.
    Packet(Vec<u8>, Vec<OwnedFd>),
    /// The other side has closed its end, or is gone.
    Closed,
    /// Nothing, until the time was over.
    Late,
}

impl Passage {
    /// Both ends of a new one.
    ///
    /// # Errors
    /// If no descriptors are left.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self { descriptor: one }, Self { descriptor: other }))
    }

    /// The end that another process has made.
    ///
    /// # Errors
    /// If the descriptor is none.
    pub fn adopt(descriptor: OwnedFd) -> io::Result<Self> {
        let is_passage = sockopt::socket_domain(&descriptor)? == AddressFamily::UNIX
            && sockopt::socket_type(&descriptor)? == SocketType::SEQPACKET;
        if !is_passage {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        Ok(Self { descriptor })
    }

    /// The end, for another process.
    #[must_use]
    pub fn into_descriptor(self) -> OwnedFd {
        self.descriptor
    }

    /// Sends a packet with descriptors, of which the other side gets duplicates.
    ///
    /// # Errors
    /// `BrokenPipe` if the other side is gone; it is too long, or too many.
    pub fn send(&self, bytes: &[u8], passed: &[BorrowedFd<'_>]) -> io::Result<()> {
        if bytes.is_empty() || bytes.len() > PACKET_BYTES_MAX || passed.len() > PASSED_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PASSED_MAX))];
        loop {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !passed.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(passed));
            }
            let slices = [IoSlice::new(bytes)];
            match rustix::net::sendmsg(&self.descriptor, &slices, &mut control, SendFlags::NOSIGNAL)
            {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The next packet. Waits until `deadline`, or for as long as it takes.
    ///
    /// # Errors
    /// A packet that is longer than any, or what the kernel says.
    pub fn receive(&self, deadline: Option<Instant>) -> io::Result<Arrival> {
        let mut bytes = vec![0; PACKET_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PASSED_MAX))];
        loop {
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [IoSliceMut::new(&mut bytes)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let received = rustix::net::recvmsg(&self.descriptor, &mut slices, &mut control, flags);
            // Taken out at once: whatever is wrong, no descriptor stays open.
            let passed: Vec<OwnedFd> = control
                .drain()
                .filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                    _ => None,
                })
                .flatten()
                .collect();
            match received {
                Ok(message) if message.bytes == 0 => return Ok(Arrival::Closed),
                Ok(message)
                    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) =>
                {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                Ok(message) => {
                    bytes.truncate(message.bytes);
                    return Ok(Arrival::Packet(bytes, passed));
                }
                // Told once if the other side has not read everything, before its last words.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                Err(Errno::AGAIN) => {
                    if !self.wait(deadline)? {
                        return Ok(Arrival::Late);
                    }
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits until there is something to receive; false if the time is over before.
    fn wait(&self, deadline: Option<Instant>) -> io::Result<bool> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.map(|left| Timespec {
                tv_sec: left.as_secs().cast_signed(),
                tv_nsec: left.subsec_nanos().into(),
            });
            match poll(&mut [PollFd::new(&self.descriptor, PollFlags::IN)], timeout.as_ref()) {
                Ok(0) if left == Some(Duration::ZERO) => return Ok(false),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Passage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_arrive_whole_with_what_was_passed() {
        let (one, other) = Passage::pair().unwrap();
        let other = Passage::adopt(other.into_descriptor()).unwrap();
        let (pipe_read, pipe_write) = rustix::pipe::pipe().unwrap();
        let many = vec![pipe_write.as_fd(); PASSED_MAX];
        one.send(b"first", &many).unwrap();
        one.send(b"second", &[]).unwrap();
        drop(pipe_write);
        let Arrival::Packet(bytes, passed) = other.receive(None).unwrap() else {
            panic!("no packet");
        };
        assert_eq!((&bytes[..], passed.len()), (&b"first"[..], PASSED_MAX));
        rustix::io::write(&passed[PASSED_MAX - 1], b"x").unwrap();
        assert_eq!(rustix::io::read(&pipe_read, &mut [0; 4]).unwrap(), 1);
        let Arrival::Packet(bytes, passed) = other.receive(Some(Instant::now())).unwrap() else {
            panic!("no packet");
        };
        assert_eq!((&bytes[..], passed.len()), (&b"second"[..], 0));
        assert!(matches!(other.receive(Some(Instant::now())).unwrap(), Arrival::Late));
        // Also when it had something left to read.
        other.send(b"unread", &[]).unwrap();
        one.send(b"last words", &[]).unwrap();
        drop(one);
        assert!(matches!(other.receive(None).unwrap(), Arrival::Packet(..)));
        assert!(matches!(other.receive(None).unwrap(), Arrival::Closed));
        assert_eq!(other.send(b"late", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn what_is_too_long_or_no_passage_is_refused() {
        let (one, _other) = Passage::pair().unwrap();
        assert!(one.send(&[1; PACKET_BYTES_MAX + 1], &[]).is_err());
        assert!(one.send(b"", &[]).is_err());
        let (pipe, _write) = rustix::pipe::pipe().unwrap();
        assert!(Passage::adopt(pipe).is_err());
    }
}
