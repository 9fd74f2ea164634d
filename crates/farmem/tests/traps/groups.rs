//! A control group whose memory is limited: what the kernel charges for pages that are brought in
//! must find room, or the program is killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::rig::{LIMIT, Rig, skipped};
use crate::servers::Server;

/// The program's 32 MiB, the supervisor, the pager, and what the kernel needs for both.
const GROUP_BYTES: u64 = 72 << 20;

/// A group of this test, of whichever version the machine has.
struct Group {
    folder: PathBuf,
}

impl Group {
    fn limited() -> Option<Self> {
        let name = format!("farmem-test-{}", std::process::id());
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
        if fs::write(group.folder.join(limit), GROUP_BYTES.to_string()).is_err() {
            return skipped("control groups do not limit memory here");
        }
        Some(group)
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
    let Some(rig) = Rig::new() else { return };
    let Some(group) = Group::limited() else { return };
    // A private server would be in the group, with all that is out.
    let server = Server::start(&rig, "1GiB");
    let program = rig.compile("in_a_group");
    let enter = format!("echo $$ > '{}/cgroup.procs' && exec \"$@\"", group.folder.display());
    let farmem = rig.farmem();
    let mut command = Command::new("timeout");
    command.args(["100", "sh", "-c", &enter, "sh"]).arg(farmem.get_program());
    command.args(["run", "--quiet", "--stats", "stats", "--local", LIMIT]);
    command.args(["--server", &server.address, "--"]).arg(program);
    let output = command.current_dir(rig.path("")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let stats = fs::read(rig.path("stats")).unwrap();
    let stats: serde_json::Value = serde_json::from_slice(&stats).unwrap();
    // 640 MiB went through 72: nearly all of them out and in again.
    assert!(stats["evicted_pages"].as_u64() > Some(128 << 10), "{stats}");
}
