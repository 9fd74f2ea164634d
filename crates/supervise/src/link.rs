//! The two ends of the control socket.
//!
//! A pager holds a [`PagerLink`]; the supervisor has one [`Listener`] and, for each pager, a
//! [`PagerPeer`]. A closed link means that the other side has died: no message is needed for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with, sockopt,
};
use rustix::process::Pid;

use crate::packet::{self, Arrival, PACKET_BYTES_MAX};
use crate::{Hello, Offer, PagerMessage, SupervisorMessage, Welcome};

/// Pagers that wait to be accepted. A tree that forks faster than the supervisor accepts waits in
/// connect, up to the pager's time-out.
const BACKLOG: i32 = 1024;

/// How long a send waits for room. The socket's buffer takes hundreds of messages, so that a full
/// one means a peer that is stopped or stuck.
const SEND_TIMEOUT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// How long a pager that is calling waits without doing something else.
const SLICE: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

/// Why the other side cannot be talked to.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No supervisor listens there, or it did not accept in time.
    #[error("cannot connect to the supervisor of this run at @{name}; it has probably ended")]
    Connect {
        /// The abstract name.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The socket of this run cannot be made.
    #[error("cannot listen for pagers at @{name}")]
    Listen {
        /// The abstract name.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The supervisor does not serve this pager.
    #[error("the supervisor refused: {0}")]
    Refused(String),
    /// The supervisor did not answer in time, or not with an answer.
    #[error("the supervisor did not answer the hello with a welcome")]
    NoWelcome,
    /// The other side has closed its end, or died.
    #[error("the other side of the control socket has gone")]
    Closed,
    /// A packet could not be sent or understood.
    #[error("the control socket failed")]
    Broken(#[from] io::Error),
}

/// What a pager has got when it is welcomed.
#[derive(Debug)]
pub struct Met {
    /// The welcome.
    pub welcome: Welcome,
    /// If its program is taken over: its userfaultfd, and the file with what is known of it.
    pub inherited: Option<(OwnedFd, OwnedFd)>,
}

/// The pager's end.
#[derive(Debug)]
pub struct PagerLink {
    socket: OwnedFd,
    buffer: Box<[u8]>,
}

impl PagerLink {
    /// Connects to the supervisor that listens at the abstract `name` and introduces this pager
    /// with its stats page. Of the userfaultfds of forked children that the supervisor offers it, it
    /// takes the one that `is_own`. Waits at most `timeout` for each step; afterwards nothing here waits
    /// for the supervisor to speak.
    ///
    /// # Errors
    /// [`LinkError::Connect`] where nobody listens, [`LinkError::Refused`] with the supervisor's
    /// reason, [`LinkError::NoWelcome`] after `timeout`.
    pub fn connect(
        name: &str,
        hello: &Hello,
        stats: BorrowedFd<'_>,
        timeout: Duration,
        is_own: &dyn Fn(BorrowedFd<'_>) -> bool,
    ) -> Result<(Self, Met), LinkError> {
        Self::connect_while(name, hello, stats, timeout, is_own, &mut || {})
    }

    /// As [`Self::connect`]; calls `meanwhile` every millisecond that it waits.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub fn connect_while(
        name: &str,
        hello: &Hello,
        stats: BorrowedFd<'_>,
        timeout: Duration,
        is_own: &dyn Fn(BorrowedFd<'_>) -> bool,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(Self, Met), LinkError> {
        let socket = dial(name, timeout, meanwhile)?;
        let mut link = Self { socket, buffer: packet_buffer() };
        link.send(&PagerMessage::Hello(hello.clone()), &[stats])?;
        let met = link.await_welcome(timeout, is_own, meanwhile)?;
        Ok((link, met))
    }

    fn await_welcome(
        &mut self,
        timeout: Duration,
        is_own: &dyn Fn(BorrowedFd<'_>) -> bool,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<Met, LinkError> {
        let mut recognised: Option<(Offer, OwnedFd)> = None;
        let mut until = Instant::now() + timeout;
        loop {
            let (message, mut descriptors) = match packet::receive(&self.socket, &mut self.buffer)?
            {
                Arrival::Message(message, descriptors) => (message, descriptors),
                Arrival::Nothing if Instant::now() < until => {
                    meanwhile();
                    poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&SLICE))
                        .map_err(io::Error::from)?;
                    continue;
                }
                Arrival::Nothing => return Err(LinkError::NoWelcome),
                Arrival::Closed => return Err(LinkError::Closed),
            };
            until = Instant::now() + timeout;
            match message {
                SupervisorMessage::Welcome(welcome) => {
                    let file = descriptors.pop().filter(|_| welcome.taken_from.is_some());
                    let inherited = recognised.map(|(_, uffd)| uffd).zip(file);
                    return Ok(Met { welcome, inherited });
                }
                SupervisorMessage::Refuse { message } => return Err(LinkError::Refused(message)),
                SupervisorMessage::Offered(offer) => {
                    let own = descriptors.pop().filter(|uffd| is_own(uffd.as_fd()));
                    recognised = recognised.or(own.map(|uffd| (offer, uffd)));
                }
                SupervisorMessage::AllOffered => {
                    let offer = recognised.as_ref().map(|(offer, _)| *offer);
                    packet::send(&self.socket, &PagerMessage::Recognised { offer }, &[])?;
                }
                SupervisorMessage::Limit { .. }
                | SupervisorMessage::HandOver { .. }
                | SupervisorMessage::Taken { .. }
                | SupervisorMessage::Returned { .. } => return Err(LinkError::NoWelcome),
            }
        }
    }

    /// Hands a duplicate of the userfaultfd to the supervisor. Before this has succeeded no page
    /// may leave the program.
    ///
    /// # Errors
    /// See [`Self::send`].
    pub fn send_armed(&self, uffd: BorrowedFd<'_>) -> Result<(), LinkError> {
        self.send(&PagerMessage::Armed, &[uffd])
    }

    /// Sends a message with its descriptors.
    ///
    /// # Errors
    /// [`LinkError::Closed`] if the supervisor has died, [`LinkError::Broken`] if it has read
    /// nothing for a second while its buffer is full.
    pub fn send(
        &self,
        message: &PagerMessage,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), LinkError> {
        send_or_wait(self.socket.as_fd(), message, descriptors)
    }

    /// The next message, if one is waiting.
    ///
    /// # Errors
    /// [`LinkError::Closed`] once the supervisor has died.
    pub fn try_receive(&mut self) -> Result<Option<SupervisorMessage>, LinkError> {
        match packet::receive(&self.socket, &mut self.buffer)? {
            Arrival::Message(message, _descriptors) => Ok(Some(message)),
            Arrival::Nothing => Ok(None),
            Arrival::Closed => Err(LinkError::Closed),
        }
    }

    /// A second hold on the same connection, to send a last message from a place that cannot
    /// reach the first one.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn duplicate(&self) -> io::Result<Self> {
        Ok(Self { socket: self.socket.try_clone()?, buffer: Box::default() })
    }

    /// To wait on: readable means that [`Self::try_receive`] has something to say.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The supervisor's socket, on which pagers of its tree call.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Listens at the abstract `name`. The name vanishes with the supervisor.
    ///
    /// # Errors
    /// [`LinkError::Listen`].
    pub fn bind(name: &str) -> Result<Self, LinkError> {
        let open = || -> io::Result<OwnedFd> {
            let socket = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
            bind(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
            listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        let socket =
            open().map_err(|source| LinkError::Listen { name: name.to_owned(), source })?;
        Ok(Self { socket })
    }

    /// The next pager that has connected, if any.
    ///
    /// # Errors
    /// What the kernel says, for example that there are too many open descriptors.
    pub fn accept(&self) -> Result<Option<PagerPeer>, LinkError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::io::retry_on_intr(|| accept_with(&self.socket, flags)) {
            Ok(socket) => Ok(Some(PagerPeer { socket, buffer: packet_buffer() })),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED) => Ok(None),
            Err(errno) => Err(io::Error::from(errno).into()),
        }
    }

    /// To wait on.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What the supervisor received from a pager.
#[derive(Debug)]
pub enum Received {
    /// A message and its descriptors.
    Message(PagerMessage, Vec<OwnedFd>),
    /// None is waiting.
    Nothing,
    /// The pager has closed its end, or died.
    Closed,
}

/// The supervisor's end towards one pager.
#[derive(Debug)]
pub struct PagerPeer {
    socket: OwnedFd,
    buffer: Box<[u8]>,
}

impl PagerPeer {
    /// The process that connected, as the kernel knows it. Abstract names have no permissions, so
    /// who calls must be checked.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn pid(&self) -> Result<Pid, LinkError> {
        Ok(sockopt::socket_peercred(&self.socket).map_err(io::Error::from)?.pid)
    }

    /// The next message, if one is waiting.
    ///
    /// # Errors
    /// [`LinkError::Broken`] for a packet that is no message; the peer is then not to be trusted.
    pub fn receive(&mut self) -> Result<Received, LinkError> {
        Ok(match packet::receive(&self.socket, &mut self.buffer)? {
            Arrival::Message(message, descriptors) => Received::Message(message, descriptors),
            Arrival::Nothing => Received::Nothing,
            Arrival::Closed => Received::Closed,
        })
    }

    /// Sends a message. Never waits: a pager whose buffer is full is stuck.
    ///
    /// # Errors
    /// [`LinkError::Closed`] if the pager has died, [`LinkError::Broken`] if its buffer is full.
    pub fn send(&self, message: &SupervisorMessage) -> Result<(), LinkError> {
        self.send_with(message, &[])
    }

    /// As [`Self::send`], with descriptors.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_with(
        &self,
        message: &SupervisorMessage,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), LinkError> {
        packet::send(&self.socket, message, descriptors).map_err(closed_or_broken)
    }

    /// To wait on.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Tells the supervisor that listens at `name` that a program goes on unpaged, and why. It believes who is
/// there when it listens: the caller should stay until the supervisor has closed the connection, which is
/// returned. Waits at most `timeout`.
///
/// # Errors
/// [`LinkError::Connect`] where nobody listens, or as many wait to be heard as may.
pub fn tell_unpaged(
    name: &str,
    program_pid: u32,
    message: &str,
    timeout: Duration,
) -> Result<OwnedFd, LinkError> {
    let socket = dial(name, timeout, &mut || {})?;
    let message = message.to_owned();
    let unpaged = PagerMessage::Unpaged { program_pid, message };
    send_or_wait(socket.as_fd(), &unpaged, &[])?;
    Ok(socket)
}

fn dial(name: &str, timeout: Duration, meanwhile: &mut dyn FnMut()) -> Result<OwnedFd, LinkError> {
    let refused = |source| LinkError::Connect { name: name.to_owned(), source };
    let address = SocketAddrUnix::new_abstract_name(name.as_bytes());
    let address = address.map_err(|errno| refused(errno.into()))?;
    let socket = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).map_err(refused)?;
    let until = Instant::now() + timeout;
    while let Err(errno) = connect(&socket, &address) {
        // As many wait to be accepted as may.
        if errno != rustix::io::Errno::AGAIN || Instant::now() >= until {
            return Err(refused(errno.into()));
        }
        meanwhile();
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(socket)
}

fn send_or_wait(
    socket: BorrowedFd<'_>,
    message: &PagerMessage,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), LinkError> {
    match packet::send(socket, message, descriptors) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&SEND_TIMEOUT))
                .map_err(io::Error::from)?;
            packet::send(socket, message, descriptors).map_err(closed_or_broken)
        }
        sent => sent.map_err(closed_or_broken),
    }
}

fn closed_or_broken(error: io::Error) -> LinkError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => LinkError::Closed,
        _ => LinkError::Broken(error),
    }
}

fn packet_buffer() -> Box<[u8]> {
    vec![0; PACKET_BYTES_MAX].into_boxed_slice()
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::PROTOCOL_VERSION;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn hello() -> Hello {
        let pager_pid = std::process::id();
        Hello { version: PROTOCOL_VERSION, program_pid: 1, pager_pid, name: "test".to_owned() }
    }

    fn welcome() -> Welcome {
        Welcome {
            limit_bytes: u64::MAX,
            limit_bytes_max: u64::MAX,
            server: "unix:/run/s".to_owned(),
            spill: None,
            reservation_bytes: 64 << 20,
            share_arena: true,
            readahead_pages_max: 64,
            pager_mark_bytes: 1 << 20,
            taken_from: None,
        }
    }

    fn await_readable(fd: BorrowedFd<'_>) {
        let timeout = Timespec { tv_sec: 10, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap(), 1);
    }

    /// Accepts one pager and returns its hello.
    fn meet(listener: &Listener) -> (PagerPeer, Hello, Vec<OwnedFd>) {
        await_readable(listener.fd());
        let mut peer = listener.accept().unwrap().unwrap();
        await_readable(peer.fd());
        match peer.receive().unwrap() {
            Received::Message(PagerMessage::Hello(hello), descriptors) => {
                (peer, hello, descriptors)
            }
            other => panic!("not a hello: {other:?}"),
        }
    }

    #[test]
    fn a_pager_is_welcomed_armed_limited_and_notices_the_end() {
        let name = format!("farmem-test-welcome-{}", std::process::id());
        let listener = Listener::bind(&name).unwrap();
        thread::scope(|scope| {
            let pager = scope.spawn(|| {
                let (stats, _other) = rustix::pipe::pipe().unwrap();
                let (mut link, met) =
                    PagerLink::connect(&name, &hello(), stats.as_fd(), PATIENCE, &|_| false)
                        .unwrap();
                assert_eq!(met.welcome, welcome());
                assert!(met.inherited.is_none());
                link.send_armed(stats.as_fd()).unwrap();
                await_readable(link.fd());
                let limit = link.try_receive().unwrap();
                assert_eq!(limit, Some(SupervisorMessage::Limit { bytes: 7 }));
                await_readable(link.fd());
                assert!(matches!(link.try_receive(), Err(LinkError::Closed)));
                assert!(matches!(link.send(&PagerMessage::Bye, &[]), Err(LinkError::Closed)));
            });
            let (mut peer, got, descriptors) = meet(&listener);
            assert_eq!((got, descriptors.len()), (hello(), 1));
            assert_eq!(peer.pid().unwrap(), rustix::process::getpid());
            peer.send(&SupervisorMessage::Welcome(welcome())).unwrap();
            await_readable(peer.fd());
            let armed = peer.receive().unwrap();
            assert!(matches!(armed, Received::Message(PagerMessage::Armed, fds) if fds.len() == 1));
            peer.send(&SupervisorMessage::Limit { bytes: 7 }).unwrap();
            drop(peer);
            pager.join().unwrap();
        });
    }

    #[test]
    fn a_refusal_reaches_the_pager_with_its_reason() {
        let name = format!("farmem-test-refuse-{}", std::process::id());
        let listener = Listener::bind(&name).unwrap();
        thread::scope(|scope| {
            let pager = scope.spawn(|| {
                let (stats, _other) = rustix::pipe::pipe().unwrap();
                PagerLink::connect(&name, &hello(), stats.as_fd(), PATIENCE, &|_| false).map(|_| ())
            });
            let (peer, ..) = meet(&listener);
            peer.send(&SupervisorMessage::Refuse { message: "no server".to_owned() }).unwrap();
            let error = pager.join().unwrap().unwrap_err();
            assert_eq!(error.to_string(), "the supervisor refused: no server");
        });
    }

    #[test]
    fn without_a_supervisor_connecting_fails_at_once_and_a_silent_one_is_timed_out() {
        let (stats, _other) = rustix::pipe::pipe().unwrap();
        let name = format!("farmem-test-absent-{}", std::process::id());
        let absent = PagerLink::connect(&name, &hello(), stats.as_fd(), PATIENCE, &|_| false);
        assert!(matches!(absent, Err(LinkError::Connect { .. })));
        let _silent = Listener::bind(&name).unwrap();
        let timeout = Duration::from_millis(20);
        let silent = PagerLink::connect(&name, &hello(), stats.as_fd(), timeout, &|_| false);
        assert!(matches!(silent, Err(LinkError::NoWelcome)));
    }

    #[test]
    fn a_supervisor_that_never_reads_ends_in_an_error_and_not_in_a_wait() {
        let name = format!("farmem-test-stuck-{}", std::process::id());
        let listener = Listener::bind(&name).unwrap();
        thread::scope(|scope| {
            let pager = scope.spawn(|| {
                let (stats, _other) = rustix::pipe::pipe().unwrap();
                let (link, _) =
                    PagerLink::connect(&name, &hello(), stats.as_fd(), PATIENCE, &|_| false)
                        .unwrap();
                loop {
                    if let Err(error) = link.send(&PagerMessage::ForkChild { key: 1 }, &[]) {
                        break error;
                    }
                }
            });
            let (peer, ..) = meet(&listener);
            peer.send(&SupervisorMessage::Welcome(welcome())).unwrap();
            assert!(matches!(pager.join().unwrap(), LinkError::Broken(_)));
            drop(peer);
        });
    }
}
