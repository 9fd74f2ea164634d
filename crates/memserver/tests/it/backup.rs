//! Regions go to backups and come back from them.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use farmem_memserver::ServerConfig;
use farmem_region::PAGE_SIZE;
use farmem_wire::{
    Action, BackupPlace, HEADER_BYTES, Header, Progress, RefusalCode, RegionInfo, Source, seal,
};
use std::io::Write;

use crate::faults::SmallDisk;
use crate::raw::{Raw, TestServer, patiently};

impl Raw {
    /// Returns the pages that were written.
    pub(crate) fn back_up(&mut self, path: &str, is_full: bool) -> Result<u64, RefusalCode> {
        let place = BackupPlace { flag: is_full, name: "", path };
        let (reply, body) = self.call(self.request(Action::Backup), |out| place.encode(out));
        reply.refusal.map_or_else(|| Ok(Progress::decode(&body).unwrap().changed.get()), Err)
    }

    /// Asks for a backup and does not wait.
    pub(crate) fn send_backup(&mut self, path: &str, is_full: bool) {
        let place = BackupPlace { flag: is_full, name: "", path };
        let mut message = vec![0; HEADER_BYTES];
        place.encode(&mut message);
        seal(self.request(Action::Backup), &mut message);
        self.stream.write_all(&message).unwrap();
    }

    pub(crate) fn restore(
        server: &TestServer,
        path: &str,
        name: &str,
        replaces: bool,
    ) -> Result<RegionInfo, RefusalCode> {
        let mut client = Self::greeted(server);
        let place = BackupPlace { flag: replaces, name, path };
        let header = Header::request(Action::Restore, 0);
        let (reply, body) = client.call(header, |out| place.encode(out));
        reply.refusal.map_or_else(|| Ok(RegionInfo::decode(&body).unwrap().0), Err)
    }
}

/// A server that may use the directory.
fn start(directory: &Path) -> TestServer {
    TestServer::start(2048, allow(directory))
}

fn allow(directory: &Path) -> impl FnOnce(&mut ServerConfig) {
    let directory = directory.canonicalize().unwrap();
    move |config| config.directories = vec![directory]
}

fn made(server: &TestServer, name: &str, source: Source<'_>) -> Raw {
    Raw::greeted(server).create(name, 400 * 4096, 4096, source).unwrap();
    Raw::opened(server, name).unwrap()
}

fn place(directory: &Path, name: &str) -> String {
    directory.canonicalize().unwrap().join(name).to_str().unwrap().to_owned()
}

#[test]
fn cap_73_cap_74_a_backup_is_of_one_instant_and_only_what_changed_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let server = start(directory.path());
    let path = place(directory.path(), "b");
    let mut region = made(&server, "region", Source::Fill(5));
    (0..200).for_each(|page| region.write(&[(page, 1, page as u8)]).unwrap());
    assert_eq!(region.back_up(&path, false), Ok(200));
    region.write(&[(7, 2, 77), (300, 1, 33)]).unwrap();
    region.free(100, 10).unwrap();
    // A process that another test begins holds the directory for a moment.
    assert_eq!(patiently(|| region.back_up(&path, false)), Ok(2));
    region.write(&[(7, 3, 78)]).unwrap();
    let info = Raw::restore(&server, &path, "again", false).unwrap();
    assert_eq!((info.stored.get(), info.pages.get(), info.page_bytes), (191, 400, 4096));
    let mut again = Raw::opened(&server, "again").unwrap();
    let found = again.read(&[(7, 2), (8, 1), (100, 0), (300, 1), (399, 0)]);
    assert_eq!(found, Ok(vec![77, 8, 5, 33, 5]));
    // What was restored is what is backed up: nothing is to be written.
    assert_eq!(again.back_up(&path, false), Ok(0));
    again.write(&[(8, 2, 9)]).unwrap();
    assert_eq!(again.back_up(&path, true), Ok(191));
    // In place of a region that is there: at once, or not at all.
    assert_eq!(Raw::restore(&server, &path, "region", false).err(), Some(RefusalCode::NameTaken));
    region.over(Action::Pin, 0, 8).unwrap();
    assert_eq!(Raw::restore(&server, &path, "region", true).err(), Some(RefusalCode::Pinned));
    region.over(Action::Unpin, 0, 8).unwrap();
    Raw::restore(&server, &path, "region", true).unwrap();
    assert_eq!(region.read(&[(8, 0)]), Err(RefusalCode::NoSession), "it is another region");
    let mut region = Raw::opened(&server, "region").unwrap();
    assert_eq!(region.read(&[(8, 2), (7, 2)]), Ok(vec![9, 77]));
    region.delete().unwrap();
    again.delete().unwrap();
    server.wait_until(|stat| (stat.slots, stat.pages, stat.reserved_bytes) == (0, 0, 0));
}

/// Cap 22, cap 73: what was never read of a file is in the backup too, as it was at that instant.
#[test]
fn cap_73_a_region_made_from_a_file_is_backed_up_whole() {
    let directory = tempfile::tempdir().unwrap();
    let server = start(directory.path());
    let file = directory.path().canonicalize().unwrap().join("file");
    let bytes: Vec<u8> = (0..400_usize).flat_map(|page| [page as u8; PAGE_SIZE]).collect();
    fs::write(&file, bytes).unwrap();
    let source = Source::File { path: file.to_str().unwrap(), offset: 0 };
    let mut region = made(&server, "region", source);
    region.write(&[(3, 1, 99)]).unwrap();
    let path = place(directory.path(), "b");
    assert_eq!(region.back_up(&path, false), Ok(400));
    region.over(Action::Flush, 0, 400).unwrap();
    fs::remove_file(&file).unwrap();
    Raw::restore(&server, &path, "again", false).unwrap();
    let mut again = Raw::opened(&server, "again").unwrap();
    assert_eq!(again.read(&[(3, 1), (4, 0), (399, 0)]), Ok(vec![99, 4, 143]));
}

/// Each is refused with a code of its own, and nothing is lost.
#[test]
fn cap_74_damaged_and_strange_backups_are_refused() {
    type Harm = fn(&Path);
    let harms: [(Harm, RefusalCode); 7] = [
        (|path| poke(path, "pages.1", 5000), RefusalCode::BadBackup),
        (|path| poke(path, "manifest", 60), RefusalCode::BadBackup),
        (|path| poke(path, "manifest", 8), RefusalCode::BackupVersion),
        (|path| fs::remove_file(path.join("pages.1")).unwrap(), RefusalCode::BadBackup),
        (|path| cut(path, "pages.1"), RefusalCode::BadBackup),
        (|path| cut(path, "manifest"), RefusalCode::BadBackup),
        (|path| fs::remove_file(path.join("manifest")).unwrap(), RefusalCode::NoFile),
    ];
    for (harm, code) in harms {
        let directory = tempfile::tempdir().unwrap();
        let server = start(directory.path());
        let path = place(directory.path(), "b");
        let mut region = made(&server, "region", Source::Fill(0));
        (0..50).for_each(|page| region.write(&[(page, 1, 1 + page as u8)]).unwrap());
        region.back_up(&path, false).unwrap();
        harm(Path::new(&path));
        let before = server.stat().slots;
        assert_eq!(Raw::restore(&server, &path, "again", false).err(), Some(code));
        assert_eq!(Raw::restore(&server, &path, "region", true).err(), Some(code));
        assert_eq!(region.read(&[(49, 1)]), Ok(vec![50]), "it still is as it was");
        let stat = server.wait_until(|stat| stat.slots == before);
        assert_eq!((stat.regions, stat.sessions), (1, 0));
        if code == RefusalCode::BackupVersion {
            assert_eq!(region.back_up(&path, true), Err(code), "it is not overwritten");
        } else {
            region.back_up(&path, true).unwrap();
            Raw::restore(&server, &path, "again", false).unwrap();
        }
    }
}

fn poke(path: &Path, name: &str, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path.join(name)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
}

fn cut(path: &Path, name: &str) {
    let file = fs::OpenOptions::new().write(true).open(path.join(name)).unwrap();
    let bytes = file.metadata().unwrap().len();
    file.set_len(bytes - 100).unwrap();
}

#[test]
fn a_path_that_is_not_allowed_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("allowed")).unwrap();
    let server = start(&directory.path().join("allowed"));
    let mut region = made(&server, "region", Source::Fill(0));
    for path in ["b", "allowed/../b", "allowed", "allowed/none/b"] {
        let path = place(directory.path(), path);
        assert_eq!(region.back_up(&path, false), Err(RefusalCode::NoFile), "{path}");
        assert!(server.logs(&path));
    }
    assert_eq!(region.back_up("", false), Err(RefusalCode::NoFile));
    assert!(!directory.path().join("b").exists());
}

#[test]
fn cap_74_a_full_disk_refuses_a_backup_and_the_former_one_stays() {
    let Some(disk) = SmallDisk::mount(1 << 20) else { return };
    let server = start(&disk.path);
    let path = place(&disk.path, "b");
    let mut region = made(&server, "region", Source::Fill(0));
    (0..100).for_each(|page| region.write(&[(page, 1, 1)]).unwrap());
    region.back_up(&path, false).unwrap();
    (0..400).for_each(|page| region.write(&[(page, 2, 2)]).unwrap());
    assert_eq!(region.back_up(&path, false), Err(RefusalCode::DiskFull));
    assert!(server.logs("cannot back up"));
    let left: Vec<PathBuf> =
        fs::read_dir(&path).unwrap().map(|file| file.unwrap().path()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    Raw::restore(&server, &path, "again", false).unwrap();
    let mut again = Raw::opened(&server, "again").unwrap();
    assert_eq!(again.read(&[(0, 1), (99, 1), (100, 0)]), Ok(vec![1, 1, 0]));
}

/// The server's own data on a disk that gets full: writes are refused as busy, nothing is lost.
#[test]
fn cap_95_a_full_disk_under_the_data_refuses_writes_and_loses_nothing() {
    let Some(disk) = SmallDisk::mount(24 << 20) else { return };
    let data = disk.path.join("data");
    let begin = || {
        let data = data.clone();
        TestServer::start(65536, |config| config.data = Some(data))
    };
    let others = disk.path.join("others");
    fs::write(&others, vec![0; 8 << 20]).unwrap();
    let server = begin();
    let mut client = Raw::with_region(&server, 60_000);
    let mut written = 0;
    let mut fill = |client: &mut Raw| {
        let refused = loop {
            match client.write(&[(written, 1, written as u8)]) {
                Ok(()) => written += 1,
                Err(code) => break code,
            }
        };
        assert_eq!(refused, RefusalCode::Busy);
        written
    };
    let first = fill(&mut client);
    // Somebody else makes room.
    fs::remove_file(&others).unwrap();
    let again = patiently(|| client.write(&[(first, 1, first as u8)]));
    assert_eq!(again, Ok(()));
    let written = fill(&mut client);
    assert!(written > first + 1000, "{first}, then {written}");
    drop(server);
    let server = begin();
    let mut client = client.attach(&server, farmem_wire::AttachMode::Join, 0).unwrap();
    for page in 0..written {
        assert_eq!(client.read(&[(page, 1)]), Ok(vec![page as u8]));
    }
    // What is freed can be written again.
    client.free(0, written).unwrap();
}
