//! One non-blocking byte stream.

use std::fmt::Debug;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use crate::{Endpoint, SLICES_MAX};

/// How far a call got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// That many bytes, at least one.
    Bytes(usize),
    /// None: wait until the descriptor is ready.
    WouldBlock,
    /// None, and none will come: the peer has closed its side.
    Closed,
}

/// A stream of bytes to a peer, which never blocks.
pub trait Connection: Debug + Send {
    /// Sends the first bytes of `slices`.
    ///
    /// # Errors
    /// The connection is broken, or could not be made.
    fn send(&mut self, slices: &[IoSlice<'_>]) -> io::Result<Moved>;

    /// Receives into `slices`, filling them in their order.
    ///
    /// # Errors
    /// The connection is broken, or could not be made.
    fn receive(&mut self, slices: &mut [IoSliceMut<'_>]) -> io::Result<Moved>;

    /// What to give to poll or epoll.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// The processor on which the peer sent last, if it is on this machine and sends by TCP.
    fn peer_processor(&self) -> Option<usize>;

    /// Whether the peer is on this machine and can take a descriptor.
    fn passes_descriptors(&self) -> bool;

    /// As [`Connection::send`]; the descriptor rides on the first byte.
    ///
    /// # Errors
    /// As `send`; also if descriptors cannot be passed.
    fn send_with(&mut self, slices: &[IoSlice<'_>], passed: BorrowedFd<'_>) -> io::Result<Moved>;

    /// As [`Connection::receive`], with the descriptor that rode on the bytes, if any.
    ///
    /// # Errors
    /// As `receive`.
    fn receive_with(
        &mut self,
        slices: &mut [IoSliceMut<'_>],
    ) -> io::Result<(Moved, Option<OwnedFd>)>;
}

/// A TCP or Unix socket.
#[derive(Debug)]
pub struct Socket {
    descriptor: OwnedFd,
    is_unix: bool,
    /// Both ends of a TCP connection are on this machine.
    is_local: bool,
    /// The last call that was to receive found nothing: see [`Socket::is_empty`].
    was_empty: bool,
}

/// Unacknowledged bytes break a TCP connection after this time. Longer than the heartbeats of the
/// layer above (which notice in one second), shorter than a session's life without a connection.
const TCP_USER_TIMEOUT_MS: u32 = 5_000;
/// An idle TCP connection is probed after, and then every, this time.
const TCP_KEEPALIVE: Duration = Duration::from_secs(2);
/// Unanswered probes that break a TCP connection.
const TCP_KEEPALIVE_PROBES: u32 = 3;
/// The congestion control of connections within one machine. It is part of every kernel, open to every
/// user, and sends at once; what paces by timers (bbr) delays each answer, and sets the processor's
/// timer for it, though no network is there to be spared.
const LOCAL_CONGESTION_CONTROL: &str = "reno";
/// Kernel buffer of a Unix socket for each direction: a message of 64 pages fits, so that its
/// sender need not wait for the receiver in the middle. More is not granted to most users
/// (`net.core.wmem_max`). TCP's buffers are left to the kernel's own tuning, which goes higher
/// than we could ask for.
const UNIX_BUFFER_BYTES: usize = 1 << 20;

impl Socket {
    /// Begins to connect, and returns at once: until the connection is made, sending and
    /// receiving say [`Moved::WouldBlock`]; if it cannot be made they fail.
    ///
    /// # Errors
    /// The kernel refused at once, for example because nobody listens at a Unix socket's path.
    pub fn connect(endpoint: &Endpoint) -> io::Result<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (descriptor, made, peer) = match endpoint {
            Endpoint::Tcp(address) => {
                let family =
                    if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
                let descriptor = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
                let made = rustix::net::connect(&descriptor, address);
                (descriptor, made, Some(*address))
            }
            Endpoint::Unix(path) => {
                let family = AddressFamily::UNIX;
                let descriptor = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
                let made = rustix::net::connect(&descriptor, &SocketAddrUnix::new(path)?);
                (descriptor, made, None)
            }
        };
        match made {
            Ok(()) | Err(Errno::INPROGRESS) => Self::with_peer(descriptor, peer),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Takes over a connected stream socket.
    ///
    /// # Errors
    /// It is no socket, or refuses its options.
    pub fn adopt(descriptor: OwnedFd) -> io::Result<Self> {
        let peer = rustix::net::getpeername(&descriptor).ok().flatten();
        let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
        Self::with_peer(descriptor, peer)
    }

    /// `peer` is the address of the other end, if it has one that is known.
    fn with_peer(descriptor: OwnedFd, peer: Option<SocketAddr>) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        let is_unix = sockopt::socket_domain(&descriptor)? == AddressFamily::UNIX;
        if is_unix {
            sockopt::set_socket_send_buffer_size(&descriptor, UNIX_BUFFER_BYTES)?;
        } else {
            sockopt::set_tcp_nodelay(&descriptor, true)?;
            sockopt::set_tcp_user_timeout(&descriptor, TCP_USER_TIMEOUT_MS)?;
            sockopt::set_socket_keepalive(&descriptor, true)?;
            sockopt::set_tcp_keepidle(&descriptor, TCP_KEEPALIVE)?;
            sockopt::set_tcp_keepintvl(&descriptor, TCP_KEEPALIVE)?;
            sockopt::set_tcp_keepcnt(&descriptor, TCP_KEEPALIVE_PROBES)?;
        }
        let is_local = peer.is_some_and(|peer| is_of(&descriptor, peer));
        if is_local {
            // Without it the connection is slower, no more.
            let _ = sockopt::set_tcp_congestion(&descriptor, LOCAL_CONGESTION_CONTROL);
        }
        Ok(Self { descriptor, is_unix, is_local, was_empty: false })
    }

    /// Whether there is still nothing to be received since a call found nothing.
    ///
    /// Who looks out for an answer asks again and again. A receiving call locks the socket, and keeps the
    /// answer from coming in meanwhile; poll(2) does not, and costs less.
    fn is_empty(&self) -> bool {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut asked = [PollFd::new(&self.descriptor, PollFlags::IN)];
        self.was_empty && poll(&mut asked, Some(&at_once)) == Ok(0)
    }
}

impl Connection for Socket {
    fn send(&mut self, slices: &[IoSlice<'_>]) -> io::Result<Moved> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            let sent = match slices {
                [one] => rustix::net::send(&self.descriptor, one, flags),
                many => rustix::net::sendmsg(
                    &self.descriptor,
                    &many[..many.len().min(SLICES_MAX)],
                    &mut SendAncillaryBuffer::default(),
                    flags,
                ),
            };
            match sent {
                Ok(count) => return Ok(Moved::Bytes(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Moved::WouldBlock),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn receive(&mut self, slices: &mut [IoSliceMut<'_>]) -> io::Result<Moved> {
        if self.is_empty() {
            return Ok(Moved::WouldBlock);
        }
        loop {
            let received = if let [one] = &mut *slices {
                rustix::net::recv(&self.descriptor, &mut **one, RecvFlags::DONTWAIT)
                    .map(|(count, _)| count)
            } else {
                let count = slices.len().min(SLICES_MAX);
                let mut no_control = RecvAncillaryBuffer::default();
                let flags = RecvFlags::DONTWAIT;
                rustix::net::recvmsg(&self.descriptor, &mut slices[..count], &mut no_control, flags)
                    .map(|message| message.bytes)
            };
            self.was_empty = matches!(received, Err(Errno::AGAIN));
            if let Some(outcome) = received_outcome(received) {
                return outcome;
            }
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    fn peer_processor(&self) -> Option<usize> {
        // Over loopback the kernel receives on the sender's processor.
        let cpu = self.is_local.then(|| sockopt::socket_incoming_cpu(&self.descriptor).ok())??;
        usize::try_from(cpu).ok()
    }

    fn passes_descriptors(&self) -> bool {
        self.is_unix
    }

    fn send_with(&mut self, slices: &[IoSlice<'_>], passed: BorrowedFd<'_>) -> io::Result<Moved> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let passed = [passed];
        loop {
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&passed));
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(&self.descriptor, slices, &mut control, flags) {
                Ok(count) => return Ok(Moved::Bytes(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Moved::WouldBlock),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn receive_with(
        &mut self,
        slices: &mut [IoSliceMut<'_>],
    ) -> io::Result<(Moved, Option<OwnedFd>)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        loop {
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received = rustix::net::recvmsg(&self.descriptor, slices, &mut control, flags)
                .map(|message| message.bytes);
            let passed = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                _ => None,
            });
            if let Some(outcome) = received_outcome(received) {
                return outcome.map(|moved| (moved, passed));
            }
        }
    }
}

/// Whether the socket's own end has the address of its peer: then both are on one machine.
fn is_of(socket: &OwnedFd, peer: SocketAddr) -> bool {
    let own = rustix::net::getsockname(socket).ok().and_then(|own| SocketAddr::try_from(own).ok());
    own.is_some_and(|own| own.ip() == peer.ip())
}

/// What a receiving call's result means; `None` to call again.
fn received_outcome(received: rustix::io::Result<usize>) -> Option<io::Result<Moved>> {
    match received {
        Ok(0) => Some(Ok(Moved::Closed)),
        Ok(count) => Some(Ok(Moved::Bytes(count))),
        Err(Errno::INTR) => None,
        Err(Errno::AGAIN) => Some(Ok(Moved::WouldBlock)),
        Err(errno) => Some(Err(errno.into())),
    }
}
