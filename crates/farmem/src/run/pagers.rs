//! What the supervisor knows of each pager.
//!
//! A pager serves one image of one program. The rule that everything here is for: from the moment
//! when a pager is armed, pages of its program may be out, and the program must not run on without
//! them. The supervisor holds a duplicate of each userfaultfd until the program has ended (while one
//! is open the kernel never hands out zero pages), and stops a program whose pager is lost.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use farmem_supervise::{
    Counter, Hello, Offer, PagerPeer, SessionReport, StatsError, StatsSnapshot,
};
use farmem_vmem::{ForkMark, same_memory};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::run::tally::ProcessCounts;
use crate::size::Size;

/// What a pager gets to end its session after its program has ended. Then the supervisor does it,
/// so that a server has its memory back within a second.
pub(crate) const FAREWELL: Duration = Duration::from_millis(500);
/// The same while processes live that may need the pager: it may not have been let run, and not have told
/// of them.
const FAREWELL_WITH_CHILDREN: Duration = Duration::from_secs(10);

/// What a pager has told so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It was welcomed. All pages are in the program still.
    Welcomed,
    /// Pages may be out: the program needs it.
    Armed,
    /// It said bye: its program has ended, or runs another image.
    Left,
}

/// One pager and its program.
#[derive(Debug)]
pub(crate) struct Pager {
    /// The control connection; `None` once it has closed.
    peer: Option<PagerPeer>,
    hello: Hello,
    stage: Stage,
    pid: Pid,
    process: OwnedFd,
    program: OwnedFd,
    stats: OwnedFd,
    /// Duplicates of the userfaultfds of the program.
    guards: Vec<OwnedFd>,
    /// Duplicates of the userfaultfds of children whose pages this pager still keeps.
    children: BTreeMap<u64, Child>,
    /// The child that this pager's program is, until it has taken it over.
    pub(crate) inherits: Option<Offer>,
    session: Option<SessionReport>,
    /// By what forked children of the program are known.
    mark: Option<(u64, u64)>,
    program_ended: Option<Instant>,
    /// When a child was last found to need it no more.
    child_gone: Option<Instant>,
    /// It gets until then to end its session, as processes live that may need it.
    waits_until: Option<Instant>,
    /// It has been told to end, the hard way.
    is_killed: bool,
    /// The program was stopped and the reason told.
    stopped: bool,
}

/// A forked child that a pager serves.
#[derive(Debug)]
struct Child {
    uffd: OwnedFd,
    /// A pager of its own is taking it over.
    promised: bool,
}

/// What is left of a pager.
#[derive(Debug)]
pub(crate) struct Remains {
    /// The last counts, if they could be read.
    pub(crate) counts: Result<ProcessCounts, StatsError>,
    /// A session that nobody has ended.
    pub(crate) session: Option<SessionReport>,
    /// People know that the program was stopped and why.
    pub(crate) stopped: bool,
}

impl Pager {
    /// Takes in a pager that has said hello.
    ///
    /// # Errors
    /// If it or its program has ended already.
    pub(crate) fn new(
        peer: PagerPeer,
        pid: Pid,
        hello: Hello,
        program: Pid,
        stats: OwnedFd,
    ) -> rustix::io::Result<Self> {
        Ok(Self {
            peer: Some(peer),
            stage: Stage::Welcomed,
            pid,
            process: pidfd_open(pid, PidfdFlags::empty())?,
            program: pidfd_open(program, PidfdFlags::empty())?,
            hello,
            stats,
            guards: Vec::new(),
            children: BTreeMap::new(),
            inherits: None,
            session: None,
            mark: None,
            program_ended: None,
            child_gone: None,
            waits_until: None,
            is_killed: false,
            stopped: false,
        })
    }

    /// The connection, while there is one.
    pub(crate) fn peer(&self) -> Option<&PagerPeer> {
        self.peer.as_ref()
    }

    /// The connection, to receive.
    pub(crate) fn peer_mut(&mut self) -> Option<&mut PagerPeer> {
        self.peer.as_mut()
    }

    /// To wait for the program's end, while it has not been noticed.
    pub(crate) fn program(&self) -> Option<BorrowedFd<'_>> {
        self.program_ended.is_none().then(|| self.program.as_fd())
    }

    /// Whether it has come to what [`Self::lose_peer`] or its program's end accounts for.
    pub(crate) fn has_begun(&self) -> bool {
        self.stage != Stage::Welcomed || self.program_ended.is_some()
    }

    /// Its process.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// The program as people know it.
    pub(crate) fn title(&self) -> String {
        format!("{} (process {})", self.hello.name, self.hello.program_pid)
    }

    /// The pager is armed; pages may leave the program from now on.
    pub(crate) fn arm(&mut self, userfaultfds: Vec<OwnedFd>) {
        self.guards = userfaultfds;
        self.stage = Stage::Armed;
    }

    /// The pager has told by what forked children of its program are known.
    pub(crate) fn set_mark(&mut self, place: u64, secret: u64) {
        self.mark = Some((place, secret));
    }

    /// Whether the process was forked from the program, and so may have inherited pages that only
    /// this pager can bring.
    pub(crate) fn is_parent_of(&self, process: Pid) -> bool {
        let itself = u32::try_from(process.as_raw_pid()) == Ok(self.hello.program_pid);
        !itself && self.mark.is_some_and(|mark| ForkMark::is_in(process, mark))
    }

    /// The session that the pager works with now.
    pub(crate) fn set_session(&mut self, session: SessionReport) {
        self.session = Some(session);
    }

    /// The program forked, and this pager keeps the child's pages for now.
    pub(crate) fn add_child(&mut self, key: u64, userfaultfds: Vec<OwnedFd>) {
        let children = userfaultfds.into_iter();
        self.children.extend(children.map(|uffd| (key, Child { uffd, promised: false })));
    }

    /// The child needs this pager no more. If it was the last one after the program's end, the pager is
    /// given its time from now on.
    pub(crate) fn remove_child(&mut self, key: u64, now: Instant) {
        self.children.remove(&key);
        (self.child_gone, self.waits_until) = (Some(now), None);
    }

    /// The pager leaves in order.
    pub(crate) fn leave(&mut self) {
        self.stage = Stage::Left;
        self.session = None;
        self.guards.clear();
        self.children.clear();
    }

    /// The connection is closed. Returns what to tell people if the program was stopped for it.
    pub(crate) fn lose_peer(&mut self) -> Option<String> {
        self.peer = None;
        if self.stage != Stage::Armed || !self.stop() {
            return None;
        }
        let out = self.counts().map_or(0, |now| now.get(Counter::ExternalBytes));
        let title = self.title();
        Some(format!(
            "lost the pager of {title}, and with it {} of its memory; stopped it",
            Size(out)
        ))
    }

    /// Whether pages may be out that nobody will bring back.
    pub(crate) fn left_pages(&self) -> bool {
        self.peer.is_none() && self.stage == Stage::Armed
    }

    /// The userfaultfds of the program, and of children whose pages this pager kept.
    pub(crate) fn take_guards(&mut self) -> impl Iterator<Item = OwnedFd> + use<> {
        let children = std::mem::take(&mut self.children).into_values().map(|child| child.uffd);
        std::mem::take(&mut self.guards).into_iter().chain(children)
    }

    /// Whether another process has the memory that the pager is in, as the program has or had.
    pub(crate) fn shares_memory_with(&self, process: Pid) -> bool {
        process != self.pid && same_memory(self.pid, process) == Some(true)
    }

    /// Whether forked children are served.
    pub(crate) fn has_children(&self) -> bool {
        !self.children.is_empty()
    }

    /// The children that nobody else is taking over, with their userfaultfds.
    pub(crate) fn children_to_offer(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>)> {
        let free = self.children.iter().filter(|(_, child)| !child.promised);
        free.map(|(&key, child)| (key, child.uffd.as_fd()))
    }

    /// Promises a child to a pager of its own; false if that cannot be.
    pub(crate) fn promise(&mut self, key: u64) -> bool {
        let child = self.children.get_mut(&key).filter(|child| !child.promised);
        child.map(|child| child.promised = true).is_some()
    }

    /// Nobody takes the child over.
    pub(crate) fn unpromise(&mut self, key: u64) {
        if let Some(child) = self.children.get_mut(&key) {
            child.promised = false;
        }
    }

    /// The session that it works with, if it has told.
    pub(crate) fn session(&self) -> Option<&SessionReport> {
        self.session.as_ref()
    }

    /// Whether the process has its memory held to a share.
    pub(crate) fn serves(&self) -> bool {
        self.stage != Stage::Left && self.program_ended.is_none()
    }

    /// The process whose memory is paged.
    pub(crate) fn program_pid(&self) -> u32 {
        self.hello.program_pid
    }

    /// The server has lost everything. Returns what to tell people if the program was stopped.
    pub(crate) fn lose_server(&mut self, server: &str) -> Option<String> {
        let session = self.session.as_ref().filter(|_| self.stage == Stage::Armed)?;
        let region = session.region;
        self.session = None;
        self.stop().then(|| {
            let title = self.title();
            format!(
                "lost memory server {server} and with it region {region} of {title}; stopped it"
            )
        })
    }

    /// Kills the program. Returns whether this is news: it had neither ended nor been stopped.
    pub(crate) fn stop(&mut self) -> bool {
        let news = !self.stopped && self.program_ended.is_none();
        self.stopped = true;
        // Fails only if the program has ended, which is as well.
        let _ = pidfd_send_signal(&self.program, Signal::KILL);
        news
    }

    /// The program has ended; the pager is expected to leave.
    pub(crate) fn note_program_end(&mut self, now: Instant) {
        self.program_ended = Some(now);
    }

    /// When to lose patience with a pager whose program has ended.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        // Once it is killed only its end is waited for: a deadline that has passed would have the
        // supervisor ask all the time, and take the processor that the pager needs to die.
        let waits = self.peer.is_some() && self.children.is_empty() && !self.is_killed;
        let alone = self.alone_since().filter(|_| waits)?;
        Some(self.waits_until.unwrap_or(alone + FAREWELL))
    }

    /// Since when there is neither its program nor, as far as it has told, a child.
    fn alone_since(&self) -> Option<Instant> {
        self.program_ended.map(|ended| self.child_gone.map_or(ended, |gone| gone.max(ended)))
    }

    /// Whether it may get longer than [`FAREWELL`].
    pub(crate) fn may_wait(&self, now: Instant) -> bool {
        self.alone_since().is_some_and(|alone| now < alone + FAREWELL_WITH_CHILDREN)
    }

    /// Gives it another [`FAREWELL`].
    pub(crate) fn wait_longer(&mut self, now: Instant) {
        self.waits_until = Some(now + FAREWELL);
    }

    /// Ends a pager that is stuck.
    pub(crate) fn kill_pager(&mut self) {
        self.is_killed = true;
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }

    /// Whether there is nothing more to wait for: the connection is closed, and the program has
    /// ended or needs no pager.
    pub(crate) fn is_over(&self) -> bool {
        self.peer.is_none() && (self.program_ended.is_some() || self.stage != Stage::Armed)
    }

    /// The present counts.
    pub(crate) fn counts(&self) -> Result<StatsSnapshot, StatsError> {
        StatsSnapshot::read(&self.stats)
    }

    /// Lets go of everything.
    pub(crate) fn remains(self) -> Remains {
        let counts = self.counts().map(|counts| ProcessCounts {
            pid: self.hello.program_pid,
            name: self.hello.name,
            counts,
        });
        Remains { counts, session: self.session, stopped: self.stopped }
    }
}

#[cfg(test)]
mod tests {
    use farmem_supervise::Listener;
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
    };

    use super::*;

    /// A pager of this process, and its end of the connection.
    fn pager() -> (Pager, OwnedFd) {
        let name = format!("farmem-test-pagers-{}", std::process::id());
        let listener = Listener::bind(&name).unwrap();
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None).unwrap();
        connect(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap()).unwrap();
        let peer = listener.accept().unwrap().unwrap();
        let (pid, number) = (rustix::process::getpid(), std::process::id());
        let name = "program".to_owned();
        let hello = Hello { version: 1, program_pid: number, pager_pid: number, name };
        let stats = socket.try_clone().unwrap();
        (Pager::new(peer, pid, hello, pid, stats).unwrap(), socket)
    }

    #[test]
    fn after_its_last_child_a_pager_has_the_time_that_it_has_after_its_program() {
        let (mut pager, socket) = pager();
        let ended = Instant::now();
        assert_eq!(pager.deadline(), None);
        pager.note_program_end(ended);
        assert_eq!(pager.deadline(), Some(ended + FAREWELL));
        assert!(!pager.may_wait(ended + FAREWELL_WITH_CHILDREN));
        pager.add_child(1, vec![socket]);
        assert_eq!(pager.deadline(), None);
        let gone = ended + 6 * FAREWELL_WITH_CHILDREN;
        pager.remove_child(1, gone);
        assert_eq!(pager.deadline(), Some(gone + FAREWELL));
        assert!(pager.may_wait(gone + FAREWELL));
        pager.wait_longer(gone + FAREWELL);
        assert_eq!(pager.deadline(), Some(gone + 2 * FAREWELL));
        assert!(!pager.may_wait(gone + FAREWELL_WITH_CHILDREN));
    }
}
