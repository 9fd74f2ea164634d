//! The watcher: waits beside the program until its resident memory comes near the limit, then
//! becomes the pager. It ends with the program, and when the program has left this memory by exec;
//! when the supervisor dies it kills the program, which nobody would hold to its limit.

use core::fmt::Write;

use crate::image::{self, Kept};
use crate::kernel::{self, Descriptor, Errno, PAGE_BYTES, POLLIN, Poll, ProcessId};
use crate::settings::settings;
use crate::spawn::{ADOPTS_ORPHANS, Start};
use crate::tell::{self, Failure};
use crate::text::Text;

/// No program dirties memory faster than this; so soon can the rest of a share be full.
const GROWTH_BYTES_PER_NANOSECOND: u64 = 8;

/// A poll costs 3 us; at this period that is half a hundredth of one processor.
const PERIOD_MIN_NANOSECONDS: u64 = 500_000;

/// Bounds how long the memory of a program that has called exec is kept.
const PERIOD_MAX_NANOSECONDS: u64 = 50_000_000;

/// The intermediate has only its exit before it.
const REPARENT_NANOSECONDS: u64 = 20_000;

/// The first function of the watcher process.
pub(crate) extern "C" fn main(start: *mut Start) -> ! {
    // SAFETY: the program and the intermediate wrote it before this process was made; from now on
    // it is only read, but for `refused`, which this process never looks at.
    let (program, intermediate, mapping) =
        unsafe { ((*start).program, (*start).intermediate, (*start).mapping) };
    let Err(failure) = Watcher::open(program, intermediate).and_then(|mut watcher| {
        watcher.watch()?;
        image::become_pager(&watcher.kept(mapping))
    });
    tell::unpaged(program, failure);
    kernel::exit(1)
}

struct Watcher {
    program: ProcessId,
    itself: ProcessId,
    program_descriptor: Descriptor,
    supervisor_descriptor: Descriptor,
    statm: Descriptor,
    /// Readable once the supervisor wants a pager; or [`NONE`].
    wanted: Descriptor,
}

/// What one look at the program says.
enum Look {
    /// This many bytes of anonymous memory are resident.
    Resident(u64),
    /// The program does not use this memory any more.
    Left,
}

impl Watcher {
    fn open(program: ProcessId, intermediate: ProcessId) -> Result<Self, Failure> {
        // Before all else: on a busy machine the program may fill its memory before a process of
        // ordinary priority has had its first turn.
        kernel::be_on_time();
        kernel::leave_process_group();
        kernel::leave_directory();
        kernel::forbid_core_dumps();
        kernel::set_name(c"farmem-watcher");
        // The program's pipes must reach their end when the program closes them. What is opened
        // now becomes 0, 1 and 2: none of these can be written, so no stray print does harm.
        // SAFETY: this process uses none of the program's descriptors.
        unsafe { kernel::close_all() };
        let program_descriptor = match kernel::pidfd_open(program) {
            Err(NO_SUCH_PROCESS) => kernel::exit(0), // A short program.
            opened => opened.map_err(Failure::at("open the program's pidfd"))?,
        };
        let statm =
            kernel::open(c"/proc/self/statm").map_err(Failure::at("open /proc/self/statm"))?;
        while kernel::getppid() == intermediate {
            kernel::wait_readable(&mut [], REPARENT_NANOSECONDS);
        }
        if kernel::getppid() == program {
            tell::unpaged_as(program, format_args!("{ADOPTS_ORPHANS}"));
            kernel::exit(0);
        }
        if kernel::getppid() == INIT && !tell::supervisor_lives() {
            // In a container with a network of its own the supervisor cannot be reached, and the
            // container's first process is the parent of orphans. Or the supervisor has died just
            // now. Nothing is out yet: the program goes on without us.
            kernel::exit(0);
        }
        let itself = kernel::getpid();
        // All signals are blocked here. In a sandbox this call may be refused.
        let wanted = kernel::signal_descriptor(PAGER_WANTED).unwrap_or(NONE);
        let supervisor_descriptor = NONE;
        let mut watcher =
            Self { program, itself, program_descriptor, supervisor_descriptor, statm, wanted };
        watcher.adopt_parent()?;
        Ok(watcher)
    }

    /// Returns when the program has come near its limit.
    fn watch(&mut self) -> Result<(), Failure> {
        let near = settings().limit_bytes / 4 * 3;
        let mut lived = PERIOD_MIN_NANOSECONDS;
        loop {
            let resident = match self.look()? {
                Look::Resident(resident) if resident < near => resident,
                Look::Resident(_) => return Ok(()),
                Look::Left => kernel::exit(0),
            };
            // Not longer than it has lived so far: most who call exec do so soon, and the memory
            // that they have left should not outlive them by much.
            let period = ((near - resident) / GROWTH_BYTES_PER_NANOSECOND)
                .clamp(PERIOD_MIN_NANOSECONDS, PERIOD_MAX_NANOSECONDS)
                .min(lived);
            lived += period;
            if self.wait(period)? {
                return Ok(());
            }
        }
    }

    /// Waits, or ends this process with the program or with the supervisor. True if the supervisor
    /// wants a pager.
    fn wait(&mut self, nanoseconds: u64) -> Result<bool, Failure> {
        let watch = |file| Poll { file, events: POLLIN, found: 0 };
        let files = [self.program_descriptor, self.supervisor_descriptor, self.wanted];
        let mut ends = files.map(watch);
        kernel::wait_readable(&mut ends, nanoseconds);
        let [program, parent, wanted] = ends;
        if program.found != 0 {
            kernel::exit(0);
        }
        if parent.found != 0 {
            self.require_supervisor();
            // SAFETY: used by nobody else; the next one gets the same number.
            unsafe { kernel::close(self.supervisor_descriptor) };
            self.adopt_parent()?;
        }
        Ok(wanted.found != 0)
    }

    /// Watches the process that is the parent now: the supervisor, or a subreaper below it.
    fn adopt_parent(&mut self) -> Result<(), Failure> {
        loop {
            let parent = kernel::getppid();
            if parent == INIT {
                self.require_supervisor(); // It may have died before this process was its child.
            }
            match kernel::pidfd_open(parent) {
                Err(NO_SUCH_PROCESS) => {} // It has died since.
                opened => {
                    self.supervisor_descriptor =
                        opened.map_err(Failure::at("open the supervisor's pidfd"))?;
                    return Ok(());
                }
            }
        }
    }

    /// Kills the program, and ends, if the supervisor is gone.
    fn require_supervisor(&self) {
        if !tell::supervisor_lives() {
            kernel::kill(self.program_descriptor);
            kernel::exit(0);
        }
    }

    fn look(&self) -> Result<Look, Failure> {
        let left = match kernel::same_memory(self.itself, self.program) {
            Ok(true) => false,
            Ok(false) => !has_no_memory(&self.read_program_statm()?),
            // Not permitted (the program has changed its user) or not built into this kernel.
            Err(_) => self.has_other_sizes()?,
        };
        if left {
            return Ok(Look::Left);
        }
        Ok(Look::Resident(anonymous_bytes(&read_statm(self.statm)?)))
    }

    /// Whether the sizes of the program's memory are not those of this one. They come from the same
    /// counters if it is the same memory, but may change between two reads, so that a difference
    /// counts only if ours were the same before and after.
    fn has_other_sizes(&self) -> Result<bool, Failure> {
        loop {
            let before = read_statm(self.statm)?;
            let theirs = self.read_program_statm()?;
            if theirs == before || has_no_memory(&theirs) {
                return Ok(false);
            }
            if read_statm(self.statm)? == before {
                return Ok(true);
            }
        }
    }

    /// Zeros if the program has ended: its pidfd, which is looked at next, says so too.
    fn read_program_statm(&self) -> Result<Statm, Failure> {
        let mut path = Text::<32>::new();
        let _ = write!(path, "/proc/{}/statm", self.program);
        let Ok(file) = kernel::open(path.as_c_str()) else {
            return Ok(Statm::default());
        };
        let statm = read_statm(file);
        // SAFETY: opened above, used by nobody else.
        unsafe { kernel::close(file) };
        Ok(statm.unwrap_or_default())
    }

    fn kept(&self, stacks: (usize, usize)) -> Kept {
        // SAFETY: nothing waits for it any more.
        unsafe { kernel::close(self.wanted) };
        Kept {
            program: self.program,
            program_descriptor: self.program_descriptor,
            statm: self.statm,
            supervisor_descriptor: self.supervisor_descriptor,
            stacks,
        }
    }
}

const NO_SUCH_PROCESS: Errno = Errno(3);

/// SIGURG, by which the supervisor asks for a pager before the program has come to its mark: other
/// processes of the run use the rest of the limit.
const PAGER_WANTED: usize = 23;

/// The process that orphans go to when no subreaper is left.
const INIT: ProcessId = 1;

/// No descriptor yet.
const NONE: Descriptor = -1;

/// The first three numbers of a statm: pages mapped, resident, and resident in files.
type Statm = [u64; 3];

fn read_statm(file: Descriptor) -> Result<Statm, Failure> {
    let mut buffer = [0; 128];
    let read = kernel::pread(file, &mut buffer, 0).map_err(Failure::at("read statm"))?;
    let mut numbers = buffer[..read].split(|byte| !byte.is_ascii_digit());
    let mut statm = [0; 3];
    for number in &mut statm {
        let digits = numbers.next().unwrap_or_default();
        *number = digits.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    }
    Ok(statm)
}

fn anonymous_bytes([_mapped, resident, of_files]: &Statm) -> u64 {
    resident.saturating_sub(*of_files) * PAGE_BYTES as u64
}

/// So it is when the program's first thread has ended while others go on in the same memory.
fn has_no_memory([mapped, ..]: &Statm) -> bool {
    *mapped == 0
}
