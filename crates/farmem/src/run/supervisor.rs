//! The supervisor's loop: waits for signals, pagers and programs, and does what they call for.
//!
//! While nothing happens it wakes up now and then to see what the processes of the run use together.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::Context;
use farmem_supervise::{
    Budget, Counter, Hello, LinkError, Listener, PROTOCOL_VERSION, PagerMessage, PagerPeer,
    QueuedSignal, Received, SessionReport, SignalQueue, StatsSnapshot, SupervisorMessage, Use,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus, kill_process, wait, waitid,
};

use crate::machine;
use crate::run::descriptors::{self, Hearing};
use crate::run::farewell::Farewells;
use crate::run::pagers::{Pager, Remains};
use crate::run::private_server::PrivateServer;
use crate::run::progress::ProgressLine;
use crate::run::tally::Tally;
use crate::run::tree::{Paged, Tree};
use crate::run::{Ending, OWN_FAILURE, family};
use crate::standard_error;

/// What the supervisor does not read, but is interrupted by: these stop it with its group, as they should.
pub(crate) const NOT_READ: [Signal; 2] = [Signal::TTIN, Signal::TTOU];

/// What the kernel sends to a terminal's process group, which the program is in, or for what the
/// supervisor itself has done. What else it sends (a timer that was set before, input on a descriptor) is meant
/// for the process that was started.
const NOT_THE_PROGRAMS: [Signal; 8] = [
    Signal::INT,
    Signal::QUIT,
    Signal::TSTP,
    Signal::WINCH,
    Signal::HUP,
    Signal::XCPU,
    Signal::XFSZ,
    Signal::PIPE,
];

/// How often the sums over the tree are looked at. A single process's peaks are exact anyway.
const SAMPLE_EVERY: Duration = Duration::from_millis(200);

/// Messages read from one pager before the others get their turn.
const MESSAGES_PER_TURN: usize = 64;

/// What a session asks of the server at first: one extent of the region.
pub(super) const RESERVATION_BYTES: u64 = 64 << 20;

/// The longest run that read-ahead fetches: 1 MiB, some 300 us of a plain TCP stream.
pub(super) const READAHEAD_PAGES_MAX: u32 = 256;

/// After so long people are told what a run is still waiting for.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a supervisor starts from.
#[derive(Debug)]
pub(crate) struct SupervisorParts {
    /// The program, just started.
    pub(crate) program: Pid,
    /// The local limit of the run.
    pub(crate) limit_bytes: u64,
    /// Where pagers connect for memory.
    pub(crate) server: String,
    /// The process behind `server`, if it is ours.
    pub(crate) private_server: Option<PrivateServer>,
    /// The directory for what the server has no room for.
    pub(crate) spill: Option<String>,
    /// Where pagers call.
    pub(crate) listener: Listener,
    /// Show a live line.
    pub(crate) progress: bool,
    /// Say nothing but errors.
    pub(crate) quiet: bool,
}

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// What `farmem run` ends with.
    pub(crate) ending: Ending,
    /// What was counted.
    pub(crate) tally: Tally,
    /// Still running, so that what the run used can be told from what it used.
    pub(crate) private_server: Option<PrivateServer>,
}

/// Names a connection for as long as the supervisor lives.
pub(super) type PagerId = u64;

/// The loop's state.
#[derive(Debug)]
pub(crate) struct Supervisor {
    pub(super) parts: SupervisorParts,
    budget: Budget<PagerId>,
    tree: Tree,
    started: Instant,
    next_sample: Instant,
    /// Connections that have not said hello, with the process that made them.
    callers: BTreeMap<PagerId, (PagerPeer, Pid)>,
    hearing: Hearing,
    pub(super) pagers: BTreeMap<PagerId, Pager>,
    /// Processes of pagers that have begun and are no longer in `pagers`, until they are waited for.
    retired: HashSet<Pid>,
    /// Userfaultfds of programs and forked children whose pager was lost.
    guards: Vec<OwnedFd>,
    next_id: PagerId,
    /// The program is stopped by a signal.
    program_stopped: bool,
    /// What the program was stopped by, if this process must follow.
    stop_with: Option<Signal>,
    program_ending: Option<(Ending, Instant)>,
    /// farmem had to stop a program: what it exits with.
    failure: Option<u8>,
    tally: Tally,
    farewells: Farewells,
    told_waiting: bool,
    line: ProgressLine,
}

/// What became ready.
#[derive(Debug, Clone, Copy)]
enum Source {
    Signals,
    Listener,
    Caller(PagerId),
    Pager(PagerId),
    Program(PagerId),
}

impl Supervisor {
    /// Starts with a program that nothing is known of yet.
    pub(crate) fn new(parts: SupervisorParts) -> Self {
        Self {
            budget: Budget::new(parts.limit_bytes),
            tree: Tree::new(parts.limit_bytes),
            started: Instant::now(),
            next_sample: Instant::now(),
            callers: BTreeMap::new(),
            hearing: Hearing::default(),
            pagers: BTreeMap::new(),
            retired: HashSet::new(),
            guards: Vec::new(),
            next_id: 0,
            program_stopped: false,
            stop_with: None,
            program_ending: None,
            failure: None,
            tally: Tally::default(),
            farewells: Farewells::default(),
            told_waiting: false,
            line: ProgressLine::new(parts.progress),
            parts,
        }
    }

    /// Returns when the program and all that it left behind have ended.
    ///
    /// # Errors
    /// Only if the kernel refuses what the loop is made of; all programs die with the supervisor
    /// then.
    pub(crate) fn run(mut self, signals: &SignalQueue) -> anyhow::Result<Outcome> {
        // Processes fill memory while a look at them waits for the processor. Where the system does not
        // let it, it waits. It starts no process any more, only threads that end sessions.
        let _ = farmem_vmem::be_real_time_with_heirs();
        // Its programs have what they had.
        machine::raise_descriptor_limit();
        let ending = loop {
            for source in self.wait(signals)? {
                self.handle(source, signals)?;
            }
            if let Some(signal) = self.stop_with.take() {
                self.line.clear();
                signals.let_through(signal).context("cannot stop with the program")?;
            }
            self.hearing.turned(Instant::now());
            self.lose_patience();
            self.look_at_tree();
            self.divide();
            self.sample();
            if let Some((ending, since)) = self.program_ending
                && self.is_over(since)
            {
                break ending;
            }
        };
        self.line.clear();
        self.farewells.wait();
        Ok(Outcome {
            ending: self.failure.map_or(ending, Ending::Exited),
            tally: self.tally,
            private_server: self.parts.private_server,
        })
    }

    fn wait(&self, signals: &SignalQueue) -> anyhow::Result<Vec<Source>> {
        let mut sources = vec![(Source::Signals, signals.as_fd())];
        if self.hearing.deaf_until().is_none() {
            sources.push((Source::Listener, self.parts.listener.fd()));
        }
        sources.extend(self.callers.iter().map(|(&id, (peer, _))| (Source::Caller(id), peer.fd())));
        for (&id, pager) in &self.pagers {
            sources.extend(pager.peer().map(|peer| (Source::Pager(id), peer.fd())));
            sources.extend(pager.program().map(|program| (Source::Program(id), program)));
        }
        let mut polled: Vec<PollFd<'_>> = sources
            .iter()
            .map(|(_, descriptor)| PollFd::from_borrowed_fd(*descriptor, PollFlags::IN))
            .collect();
        let timeout = self.timeout(Instant::now());
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context("the supervisor cannot wait (poll)"),
        }
        let ready = polled.iter().map(|polled| !polled.revents().is_empty());
        Ok(sources.iter().zip(ready).filter(|(_, ready)| *ready).map(|((s, _), _)| *s).collect())
    }

    fn timeout(&self, now: Instant) -> Option<Duration> {
        let samples = !self.pagers.is_empty() || self.line.is_wanted();
        let sample = samples.then_some(SAMPLE_EVERY);
        let deadlines = self.pagers.values().filter_map(Pager::deadline);
        let division = self.budget.next().map(|next| self.started + next);
        let deadlines = deadlines.chain(division).chain([self.tree.next_look()]);
        let patience = self.program_ending.filter(|_| !self.told_waiting);
        let patience = patience.map(|(_, since)| since + PATIENCE);
        let deadline = deadlines.chain(patience).chain(self.hearing.deaf_until()).min();
        let until = deadline.map(|deadline| deadline.saturating_duration_since(now));
        sample.into_iter().chain(until).min()
    }

    fn handle(&mut self, source: Source, signals: &SignalQueue) -> anyhow::Result<()> {
        match source {
            Source::Signals => {
                while let Some(signal) = signals.next().context("cannot read signals")? {
                    self.note_killed_watcher(signal);
                    self.handle_signal(signal);
                }
            }
            Source::Listener => self.accept(),
            Source::Caller(id) => self.hear_caller(id),
            Source::Pager(id) => self.hear_pager(id),
            Source::Program(id) => {
                if let Some(pager) = self.pagers.get_mut(&id) {
                    pager.note_program_end(Instant::now());
                }
                self.retire(id);
            }
        }
        Ok(())
    }

    // Signals and processes.

    /// A watcher ends with its program, or becomes a pager. Whoever kills one, or a pager that has not begun,
    /// leaves a program that nobody will hold to the limit. To be called before the child is waited for.
    fn note_killed_watcher(&mut self, signal: QueuedSignal) {
        let Some(child) = signal.killed_child.and_then(process) else { return };
        let has_begun = |pager: &Pager| pager.pid() == child && pager.has_begun();
        let what = if family::is_watcher(child) {
            "a watcher"
        } else if family::is_pager(child)
            && !self.retired.contains(&child)
            && !self.pagers.values().any(has_begun)
        {
            "a pager that had not begun"
        } else {
            return;
        };
        let pid = child.as_raw_pid();
        self.say(&format!(
            "{what} (process {pid}) was killed: the program that it watched goes on unpaged, and \
             nothing holds it to the limit"
        ));
    }

    fn handle_signal(&mut self, signal: QueuedSignal) {
        // Real-time signals have none.
        let named = Signal::from_named_raw(signal.number);
        if named == Some(Signal::CHILD) {
            self.reap();
        } else if named == Some(Signal::CONT) {
            // The shell continues the whole group; whoever continues the supervisor alone means
            // the program.
            self.reap();
            if self.program_stopped {
                self.pass_on(signal);
            }
        } else if signal.sent_by_process || (!signal.is_own && is_for_program(named)) {
            self.pass_on(signal);
        }
    }

    /// Sends a signal to the program, or to what it left behind.
    fn pass_on(&self, signal: QueuedSignal) {
        if self.program_ending.is_none() {
            let _ = signal.pass_on(self.parts.program);
            return;
        }
        for pid in self.left_behind() {
            let _ = signal.pass_on(pid);
        }
    }

    fn reap(&mut self) {
        let changes = WaitOptions::NOHANG | WaitOptions::UNTRACED | WaitOptions::CONTINUED;
        let look = WaitIdOptions::EXITED
            | WaitIdOptions::STOPPED
            | WaitIdOptions::CONTINUED
            | WaitIdOptions::NOHANG
            | WaitIdOptions::NOWAIT;
        while let Ok(Some(_)) = waitid(WaitId::All, look) {
            // Who gives its priority up may wait for it: only for what is there.
            let reaped = farmem_vmem::without_real_time(|| wait(changes));
            let Ok(Some((pid, status))) = reaped else { break };
            let ended = status.exited() || status.signaled();
            if ended {
                self.retired.remove(&pid);
            }
            if pid == self.parts.program {
                self.program_changed(status);
            } else if ended && self.is_private_server(pid) {
                self.private_server_ended(status);
            }
        }
    }

    fn program_changed(&mut self, status: WaitStatus) {
        if let Some(ending) = ending(status) {
            self.program_ending = Some((ending, Instant::now()));
        } else if status.continued() {
            self.program_stopped = false;
        } else if status.stopped() {
            self.program_stopped = true;
            // Ctrl-Z, or reading the terminal from the background: the shell waits for this
            // process to stop too. Whoever sends SIGSTOP means the program alone.
            let job_control = [Signal::TSTP, Signal::TTIN, Signal::TTOU];
            let stopped_by = status.stopping_signal().and_then(Signal::from_named_raw);
            self.stop_with =
                stopped_by.filter(|signal| job_control.contains(signal) && has_terminal());
        }
    }

    fn is_private_server(&self, pid: Pid) -> bool {
        self.parts.private_server.as_ref().is_some_and(|server| server.pid() == pid)
    }

    /// Whatever was out is lost, and nothing more can go out.
    fn private_server_ended(&mut self, status: WaitStatus) {
        if let Some(mut server) = self.parts.private_server.take() {
            server.has_ended();
        }
        let how = match ending(status) {
            Some(Ending::Signalled(signal)) => format!("it was killed by signal {signal}"),
            _ => "it ended by itself".to_owned(),
        };
        let server = &self.parts.server;
        let lost: Vec<String> =
            self.pagers.values_mut().filter_map(|pager| pager.lose_server(server)).collect();
        for message in &lost {
            self.failure = Some(OWN_FAILURE);
            self.say(&format!("{message}: {how}"));
        }
        if lost.is_empty() {
            self.remark(&format!("lost the private memory server: {how}; no memory was out"));
        }
    }

    /// Processes that the program has left running: no pagers, and not our server.
    fn left_behind(&self) -> Vec<Pid> {
        let mut children = family::children();
        children.retain(|&pid| !self.is_private_server(pid) && !family::is_ours(pid));
        children
    }

    /// Whether nothing of the run is left. Orphans and daemons stay under the supervisor until
    /// they end: without it nobody would hold them to the limit, or keep their memory.
    fn is_over(&mut self, since: Instant) -> bool {
        if !self.told_waiting && since.elapsed() >= PATIENCE {
            // Whatever it finds: a deadline that has passed would have the loop turn without a pause, with a
            // priority that lets nobody else run.
            self.told_waiting = true;
            self.tell_waiting();
        }
        if !self.pagers.is_empty() {
            return false;
        }
        family::children().into_iter().all(|pid| self.is_private_server(pid))
    }

    fn tell_waiting(&mut self) {
        let left = self.left_behind();
        if left.is_empty() {
            return;
        }
        let pids: Vec<String> = left.iter().map(|pid| pid.as_raw_pid().to_string()).collect();
        self.remark(&format!(
            "the program has ended; waiting for what it left running (process {})",
            pids.join(", ")
        ));
    }

    // Pagers.

    fn accept(&mut self) {
        loop {
            match self.parts.listener.accept() {
                Ok(Some(peer)) => self.take_call(peer),
                Ok(None) => return,
                Err(error) => {
                    self.hearing.rest(Instant::now());
                    self.tell_unheard(&chain(&error));
                    return;
                }
            }
        }
    }

    /// Abstract names have no permissions: a connection counts only if it comes from the run.
    fn take_call(&mut self, peer: PagerPeer) {
        let Ok(pid) = peer.pid() else { return };
        if !descriptors::are_left(peer.fd()) {
            // Not even whether it comes from the run could be seen. Closed, it leaves its program as it is.
            self.tell_unheard(&descriptors::shortage());
            return;
        }
        self.hearing.heard();
        if family::is_descendant(pid) {
            self.callers.insert(self.next_id, (peer, pid));
            self.next_id += 1;
        }
    }

    fn tell_unheard(&mut self, why: &str) {
        if self.hearing.is_news() {
            self.say(&format!(
                "cannot take in a pager: {why}; its program goes on unpaged, and nothing holds it to the limit"
            ));
        }
    }

    fn hear_caller(&mut self, id: PagerId) {
        let Some((mut peer, pid)) = self.callers.remove(&id) else {
            return;
        };
        match peer.receive() {
            Ok(Received::Message(PagerMessage::Hello(hello), descriptors)) => {
                self.greet(id, peer, pid, hello, descriptors);
            }
            Ok(Received::Message(PagerMessage::Unpaged { program_pid, message }, _)) => {
                // One that has ended meanwhile needs no pager. One with process ids of its own that calls by
                // itself is who calls.
                let named = process(program_pid).filter(|&pid| family::is_descendant(pid));
                if let Some(program) = named.or(Some(pid).filter(|&pid| !family::is_ours(pid))) {
                    let number = program.as_raw_pid();
                    self.remark(&format!("process {number} is not paged: {message}"));
                }
            }
            Ok(Received::Nothing) => {
                self.callers.insert(id, (peer, pid));
            }
            // Closed before it said who it was, or is no pager.
            Ok(Received::Message(..) | Received::Closed) | Err(_) => {}
        }
    }

    fn greet(
        &mut self,
        id: PagerId,
        peer: PagerPeer,
        pid: Pid,
        hello: Hello,
        mut descriptors: Vec<OwnedFd>,
    ) {
        let title = format!("{} (process {})", hello.name, hello.program_pid);
        let refusal = match self.refusal(&hello, descriptors.len()) {
            Ok(program) => {
                let stats = descriptors.swap_remove(0);
                match Pager::new(peer, pid, hello, program, stats) {
                    Ok(pager) => self.pagers.insert(id, pager),
                    // It has ended meanwhile.
                    Err(rustix::io::Errno::SRCH) => return,
                    Err(errno) => return self.say(&format!("{title} is not paged: {errno}")),
                };
                if !self.offer_children(id, program) {
                    self.welcome(id, None);
                }
                return;
            }
            Err(refusal) => refusal,
        };
        // Neither a process that has ended meanwhile nor its pager misses anything. One that has
        // numbers of its own for its processes is not known here by them either.
        let own_numbers = u32::try_from(pid.as_raw_pid()) != Ok(hello.pager_pid);
        if own_numbers || process(hello.program_pid).is_some_and(family::exists) {
            self.say(&format!("{title} is not paged: {refusal}"));
        }
        // A pager that cannot even take a refusal has ended.
        let _ = peer.send(&SupervisorMessage::Refuse { message: refusal });
    }

    /// Why a pager cannot be served, or the program that it will be served for.
    fn refusal(&self, hello: &Hello, descriptors: usize) -> Result<Pid, String> {
        if hello.version != PROTOCOL_VERSION {
            return Err(format!(
                "farmem-pagerd speaks version {} and farmem version {PROTOCOL_VERSION}; install \
                 both from one build",
                hello.version
            ));
        }
        if descriptors != 1 {
            return Err("its pager shares no stats page".to_owned());
        }
        process(hello.program_pid)
            .filter(|&pid| family::is_descendant(pid))
            .ok_or_else(|| "it does not belong to this run, or has its own process ids".to_owned())
    }

    /// Lets a pager begin, perhaps with what its program has inherited from another one's.
    pub(super) fn welcome(&mut self, id: PagerId, legacy: Option<(OwnedFd, SessionReport)>) {
        let now = self.started.elapsed();
        let program = self.pagers.get(&id).and_then(|pager| process(pager.program_pid()));
        let resident = program.map_or(0, |program| self.tree.has_pager(program));
        self.budget.note_unpaged(now, self.tree.unpaged_bytes());
        self.note_use();
        self.budget.join(now, id, resident);
        self.share_out(Some((id, legacy)));
    }

    /// Sees what processes without a pager use, and that they get one if it is too much.
    fn look_at_tree(&mut self) {
        if Instant::now() < self.tree.next_look() {
            return;
        }
        let serving = self.pagers.values().filter(|pager| pager.serves());
        let pids: Vec<Pid> = serving.filter_map(|pager| process(pager.program_pid())).collect();
        let counts = self.pagers.values().flat_map(Pager::counts);
        let bytes = counts.map(|counts| counts.get(Counter::ResidentBytes)).sum();
        let is_parent_of = |pid| self.pagers.values().any(|pager| pager.is_parent_of(pid));
        let members = pids.len() + self.tree.unpaged_count();
        let floor_bytes = self.budget.floor_bytes(members);
        let paged = Paged { pids: &pids, bytes, is_parent_of: &is_parent_of, floor_bytes };
        let server = self.parts.private_server.as_ref().map(PrivateServer::pid);
        self.tree.look(&paged, |pid| Some(pid) == server);
        self.budget.note_unpaged(self.started.elapsed(), self.tree.unpaged_bytes());
    }

    /// Divides the limit anew, when it is time.
    fn divide(&mut self) {
        if self.budget.next().is_some_and(|next| next <= self.started.elapsed()) {
            self.note_use();
            self.share_out(None);
        }
    }

    fn note_use(&mut self) {
        let now = self.started.elapsed();
        for (&id, pager) in &self.pagers {
            if let Ok(counts) = pager.counts()
                && counts.get(Counter::LimitBytes) > 0
            {
                self.budget.note(now, id, used(&counts));
            }
        }
    }

    /// Tells pagers their new shares; those who lose come first. The newcomer gets its welcome.
    fn share_out(&mut self, mut newcomer: Option<(PagerId, Option<(OwnedFd, SessionReport)>)>) {
        for (id, bytes) in self.budget.divide(self.started.elapsed()) {
            let (message, file) = match newcomer.take_if(|(newcomer, _)| *newcomer == id) {
                Some((_, legacy)) => {
                    let (file, session) = legacy.unzip();
                    (SupervisorMessage::Welcome(self.welcome_with(bytes, session)), file)
                }
                None => (SupervisorMessage::Limit { bytes }, None),
            };
            let file: Vec<_> = file.iter().map(AsFd::as_fd).collect();
            let peer = self.pagers.get(&id).and_then(Pager::peer);
            let sent = peer.map(|peer| peer.send_with(&message, &file));
            // Where it has ended, its closed connection will tell.
            if let Some(Err(error @ LinkError::Broken(_))) = sent {
                self.say(&format!("cannot tell a pager its limit: {error}"));
            }
        }
    }

    fn hear_pager(&mut self, id: PagerId) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(peer) = self.pagers.get_mut(&id).and_then(Pager::peer_mut) else {
                return;
            };
            match peer.receive() {
                Ok(Received::Message(message, descriptors)) => {
                    self.obey(id, message, descriptors);
                }
                Ok(Received::Nothing) => return,
                Ok(Received::Closed) => return self.lose(id),
                // A pager that sends what is no message cannot be relied on.
                Err(error) => {
                    let title = self.pagers.get(&id).map(Pager::title).unwrap_or_default();
                    self.say(&format!("no message from the pager of {title}: {}", chain(&error)));
                    return self.lose(id);
                }
            }
        }
    }

    fn obey(&mut self, id: PagerId, message: PagerMessage, descriptors: Vec<OwnedFd>) {
        let Some(pager) = self.pagers.get_mut(&id) else {
            return;
        };
        match message {
            PagerMessage::Marked { place, secret } => pager.set_mark(place, secret),
            PagerMessage::Armed => {
                pager.arm(descriptors);
                self.child_taken(id);
            }
            PagerMessage::Recognised { offer } => self.recognised(id, offer),
            PagerMessage::Declined => self.return_child(id),
            PagerMessage::HandedOver { key } => {
                self.handed_over(id, key, descriptors.into_iter().next());
            }
            PagerMessage::Kept { key } => self.handed_over(id, key, None),
            PagerMessage::Session(session) => pager.set_session(session),
            PagerMessage::ForkChild { key } => pager.add_child(key, descriptors),
            PagerMessage::ForkChildGone { key } => pager.remove_child(key, Instant::now()),
            PagerMessage::Bye => pager.leave(),
            PagerMessage::Fatal { message, exit_code } => {
                if pager.stop() {
                    let title = pager.title();
                    self.failure = Some(exit_code);
                    self.say(&format!("{message}; stopped {title}"));
                }
            }
            PagerMessage::Unpaged { message, .. } => {
                let title = pager.title();
                self.remark(&format!("{title} is not paged: {message}"));
            }
            // Once is enough.
            PagerMessage::Hello(_) => {}
        }
    }

    /// The connection to a pager is closed.
    fn lose(&mut self, id: PagerId) {
        let Some(pager) = self.pagers.get_mut(&id) else {
            return;
        };
        if let Some(message) = pager.lose_peer() {
            self.failure = Some(OWN_FAILURE);
            self.say(&message);
        }
        self.stop_children_of(id);
        self.return_child(id);
        self.retire(id);
    }

    /// Stops forked children whose pages a lost pager kept, and who shared its program's memory.
    fn stop_children_of(&mut self, id: PagerId) {
        let Some(pager) = self.pagers.get_mut(&id).filter(|pager| pager.left_pages()) else {
            return;
        };
        // Open until the run has ended: nobody may read a zero page before it dies.
        self.guards.extend(pager.take_guards());
        for pid in self.dependents_of(id) {
            let number = pid.as_raw_pid();
            let _ = kill_process(pid, Signal::KILL);
            self.failure = Some(OWN_FAILURE);
            self.say(&format!("stopped its forked child (process {number}) too"));
        }
    }

    /// Processes that may need what a pager keeps: those that are known to be forked from its program,
    /// whether they have pagers of their own or not, and whoever is registered with a userfaultfd and
    /// has no pager of its own.
    fn dependents_of(&self, id: PagerId) -> Vec<Pid> {
        let Some(pager) = self.pagers.get(&id) else {
            return Vec::new();
        };
        let served: Vec<u32> = self.pagers.values().map(Pager::program_pid).collect();
        let mut dependents = family::descendants();
        dependents.retain(|&pid| {
            let is_served = served.contains(&pid.as_raw_pid().unsigned_abs());
            !family::is_ours(pid)
                && (pager.is_parent_of(pid) || (!is_served && family::has_userfaultfd(pid)))
        });
        dependents
    }

    /// Whether somebody has the memory that a pager's program has left (a child of vfork, say): that one
    /// needs the pager for as long.
    fn is_shared(&self, id: PagerId) -> bool {
        let shares = |pid| self.pagers.get(&id).is_some_and(|pager| pager.shares_memory_with(pid));
        family::descendants().into_iter().any(|pid| !family::is_ours(pid) && shares(pid))
    }

    /// Lets a pager go if there is nothing more to wait for.
    fn retire(&mut self, id: PagerId) {
        if !self.pagers.get(&id).is_some_and(Pager::is_over) {
            return;
        }
        let Some(pager) = self.pagers.remove(&id) else {
            return;
        };
        if pager.has_begun() {
            self.retired.insert(pager.pid());
        }
        let title = pager.title();
        let Remains { counts, session, stopped } = pager.remains();
        match counts {
            Ok(counts) => self.tally.ended(counts),
            Err(error) => self.say(&format!("the counts of {title} are lost: {error}")),
        }
        if let Some(session) = session {
            self.farewells.add(session, stopped);
        }
        self.budget.leave(self.started.elapsed(), id);
    }

    /// Ends pagers that do not leave though their programs have ended.
    fn lose_patience(&mut self) {
        let now = Instant::now();
        let is_due = |pager: &Pager| pager.deadline().is_some_and(|deadline| deadline <= now);
        let due: Vec<PagerId> =
            self.pagers.iter().filter(|(_, pager)| is_due(pager)).map(|(&id, _)| id).collect();
        for id in due {
            // It may not have been let tell of a child that its program forked before it ended.
            let may_wait = self.pagers.get(&id).is_some_and(|pager| pager.may_wait(now));
            let waits = self.is_shared(id) || (may_wait && !self.dependents_of(id).is_empty());
            if let Some(pager) = self.pagers.get_mut(&id) {
                if waits { pager.wait_longer(now) } else { pager.kill_pager() }
            }
        }
    }

    fn sample(&mut self) {
        if self.pagers.is_empty() {
            let resident = || family::resident_bytes(self.parts.program);
            self.line.show_unpaged(resident, self.budget.limit_bytes());
            return;
        }
        if Instant::now() < self.next_sample {
            return;
        }
        self.next_sample = Instant::now() + SAMPLE_EVERY;
        let mut sum = StatsSnapshot::empty();
        self.pagers.values().flat_map(Pager::counts).for_each(|counts| sum.add(&counts));
        self.tally.sample(&sum);
        self.line.show(&sum, self.budget.limit_bytes());
    }

    /// Tells a person what went wrong.
    fn say(&mut self, message: &str) {
        self.line.clear();
        standard_error::tell(message);
    }

    /// Tells a person what may be of interest.
    fn remark(&mut self, message: &str) {
        if !self.parts.quiet {
            self.say(message);
        }
    }
}

/// An error with what has caused it.
fn chain(error: &LinkError) -> String {
    let cause = std::error::Error::source(error);
    cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

/// What a process uses, for the division of the limit.
fn used(counts: &StatsSnapshot) -> Use {
    let brought = [Counter::FetchedPages, Counter::VictimHits, Counter::ZeroFilledPages];
    Use {
        resident_bytes: counts.get(Counter::ResidentBytes),
        external_bytes: counts.get(Counter::ExternalBytes),
        pages_in: brought.iter().map(|&counter| counts.get(counter)).sum(),
    }
}

fn ending(status: WaitStatus) -> Option<Ending> {
    let exited = status.exit_status().map(|status| u8::try_from(status & 0xff).unwrap_or(u8::MAX));
    exited.map(Ending::Exited).or_else(|| status.terminating_signal().map(Ending::Signalled))
}

fn process(number: u32) -> Option<Pid> {
    i32::try_from(number).ok().and_then(Pid::from_raw)
}

/// Whether a signal that the kernel has sent to the supervisor has not reached the program, and would natively.
fn is_for_program(signal: Option<Signal>) -> bool {
    // A terminal that is gone is told to the leader of its session alone.
    let hangup = signal == Some(Signal::HUP) && leads_session();
    hangup || signal.is_none_or(|signal| !NOT_THE_PROGRAMS.contains(&signal))
}

fn leads_session() -> bool {
    rustix::process::getsid(None).is_ok_and(|leader| leader == rustix::process::getpid())
}

/// Whether there is a terminal whose job control could continue this process.
fn has_terminal() -> bool {
    std::fs::File::open("/dev/tty").is_ok()
}
