//! A control group whose memory is limited: what the kernel charges for pages that are brought in
//! must find room, or the program is killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::rig::{LIMIT, Rig, skipped};
use crate::servers::Server;

/// These tests go one after the other: a kernel that takes memory back lets nobody else run on its processor for
/// tens of milliseconds, and a program that is not held for so long fills a small group.
static TURN: Mutex<()> = Mutex::new(());

/// The program's 32 MiB, the supervisor, the pager, and what the kernel needs for both.
const GROUP_BYTES: u64 = 72 << 20;

/// What the pager may take of it: 32 bytes for each of the 90,000 pages that there are at one time, and as
/// much again. No more when a mapping of 80,000 pages goes away at once.
const PAGER_BYTES: u64 = 6 << 20;

/// A group of this test, of whichever version the machine has.
struct Group {
    folder: PathBuf,
}

/// What four processes beside each other may keep, each of which touches 128 MiB.
const TREE_LIMIT: &str = "64MiB";
/// And what they may take for it: as much again for what is brought in and copied while the pagers of
/// children start, and the supervisor. Without a limit it is 400 MiB.
const TREE_BYTES: u64 = 160 << 20;

impl Group {
    fn limited(bytes: u64) -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("farmem-test-{}-{number}", std::process::id());
        let first = Path::new("/sys/fs/cgroup/memory");
        let (root, limit) = if first.is_dir() {
            (first, "memory.limit_in_bytes")
        } else {
            (Path::new("/sys/fs/cgroup"), "memory.max")
        };
        let folder = root.join(name);
        if fs::create_dir(&folder).is_err() {
            return skipped("no control group can be made here (needs root)");
        }
        let group = Self { folder };
        if fs::write(group.folder.join(limit), bytes.to_string()).is_err() {
            return skipped("control groups do not limit memory here");
        }
        Some(group)
    }

    /// Runs farmem in the group, with a server outside: a private one would be in it, with all that
    /// is out.
    fn run(
        &self,
        rig: &Rig,
        server: &Server<'_>,
        limit: &str,
        program: &Path,
    ) -> serde_json::Value {
        let enter = format!("echo $$ > '{}/cgroup.procs' && exec \"$@\"", self.folder.display());
        let farmem = rig.farmem();
        let mut command = Command::new("timeout");
        command.args(["100", "sh", "-c", &enter, "sh"]).arg(farmem.get_program());
        command.args(["run", "--quiet", "--stats", "stats", "--local", limit]);
        command.args(["--server", &server.address, "--"]).arg(program);
        let output = command.current_dir(rig.path("")).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let stats = fs::read(rig.path("stats")).unwrap();
        serde_json::from_slice(&stats).unwrap()
    }

    /// Has the kernel take back what it can of the group's memory.
    fn reclaim(&self) {
        let how = [("memory.force_empty", "0"), ("memory.reclaim", "64M")];
        // Refused where little can be had, which is as good.
        let _ = how.map(|(file, text)| fs::write(self.folder.join(file), text));
    }

    /// The most that was in the group at one time.
    fn peak_bytes(&self) -> Option<u64> {
        let names = ["memory.max_usage_in_bytes", "memory.peak"];
        let text = names.iter().find_map(|name| fs::read_to_string(self.folder.join(name)).ok())?;
        text.trim().parse().ok()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}

/// R1, R6: pages come and go although the group has no room for more.
#[test]
fn u20_a_program_completes_in_a_small_control_group() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(rig) = Rig::new() else { return };
    let Some(group) = Group::limited(GROUP_BYTES) else { return };
    let server = Server::start(&rig, "1GiB");
    let stats = group.run(&rig, &server, LIMIT, &rig.compile("in_a_group"));
    // 640 MiB went through 72: nearly all of them out and in again.
    assert!(stats["evicted_pages"].as_u64() > Some(128 << 10), "{stats}");
    let pager = stats["pager_bytes"].as_u64().unwrap();
    assert!(pager <= PAGER_BYTES, "the pager took {pager} bytes: {stats}");
}

/// R1, R3: what the kernel takes back of pages that were moved out is nothing that the pager waits for.
#[test]
fn u37_pages_that_the_kernel_takes_back_meanwhile_hold_nobody_up() {
    /// For the first rounds. The kernel looks for what it can take back as often as it is asked to.
    const PRESSURE: Duration = Duration::from_secs(5);
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(rig) = Rig::new() else { return };
    let Some(group) = Group::limited(1 << 30) else { return };
    let server = Server::start(&rig, "1GiB");
    let program = rig.compile("freed_lazily");
    let stats = std::thread::scope(|scope| {
        scope.spawn(|| {
            let end = Instant::now() + PRESSURE;
            while Instant::now() < end {
                group.reclaim();
            }
        });
        group.run(&rig, &server, "48MiB", &program)
    });
    assert!(stats["evicted_pages"].as_u64() > Some(16 << 10), "{stats}");
}

/// Caps 21, 33: what children inherit and bring in is held to the limit of the tree.
#[test]
fn u13_a_tree_of_forks_stays_near_its_limit() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(rig) = Rig::new() else { return };
    let Some(group) = Group::limited(1 << 30) else { return };
    let server = Server::start(&rig, "2GiB");
    let stats = group.run(&rig, &server, TREE_LIMIT, &rig.compile("fork_nested"));
    assert!(stats["fork_events"].as_u64() == Some(3), "{stats}");
    let Some(peak) = group.peak_bytes() else {
        return skipped("this kernel does not tell a control group's peak").unwrap_or(());
    };
    assert!(peak <= TREE_BYTES, "{peak} bytes: {stats}");
    assert_eq!(server.show()["sessions"], 0);
}
