//! What a program gives back of a mapping, with `madvise`.
#![expect(unsafe_code, reason = "madvise")]

use std::io;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use farmem_client::{MappedRegion, Region};
use farmem_memserver::{DistantRegion, Neighbours, Use};
use farmem_region::{ByteCount, PageCount, PageIndex, PageRange};
use farmem_remote::named::{self, NamedRegion, RangeAction};
use farmem_wire::{Create, Source};

use crate::mapped::may_page;
use crate::named::{SIZE, TIMEOUT, of_file};
use crate::server::TestServer;

const PAGE: usize = 4096;

fn give_back(mapped: &mut MappedRegion, pages: Range<usize>) {
    let bytes = &mut mapped.as_mut_slice()[pages.start * PAGE..pages.end * PAGE];
    // SAFETY: the memory is this slice's, and zeros are bytes.
    let given =
        unsafe { libc::madvise(bytes.as_mut_ptr().cast(), bytes.len(), libc::MADV_DONTNEED) };
    assert_eq!(given, 0, "{}", io::Error::last_os_error());
}

/// Cap 8: single pages too where the region's are larger, and of an aligned range those that are stored.
#[test]
fn cap_8_what_a_mapping_gives_back_is_as_the_file_has_it() {
    if !may_page() {
        return;
    }
    for page_bytes in [4096, 64 << 10, 2 << 20] {
        let (_server, _directory, _path, mut content, options) = of_file(page_bytes);
        let mut mapped = Region::open("file", options.clone()).unwrap().map().unwrap();
        let given = [5, 512, 513, 700, 1023];
        for page in given.into_iter().chain([4, 6, 511, 1024]) {
            mapped.as_mut_slice()[page * PAGE..(page + 1) * PAGE].fill(0xee);
        }
        mapped.flush().unwrap();
        give_back(&mut mapped, 5..6);
        give_back(&mut mapped, 512..1024);
        mapped.flush().unwrap();
        drop(mapped.unmap().unwrap());
        for page in [4, 6, 511, 1024] {
            content[page * PAGE..(page + 1) * PAGE].fill(0xee);
        }
        let mut region = Region::open("file", options).unwrap();
        let mut found = vec![0; content.len()];
        region.read(0, &mut found).unwrap();
        assert!(found == content, "{page_bytes}");
    }
}

/// Cap 11: what a program drops it has dropped, whoever keeps it in the server's memory.
#[test]
fn cap_11_a_mapping_gives_back_what_another_client_has_pinned() {
    if !may_page() {
        return;
    }
    let (_server, _directory, _path, mut content, options) = of_file(4096);
    let mut other = NamedRegion::open(&options.server, "file", false, TIMEOUT).unwrap();
    let mut mapped = Region::open("file", options.clone()).unwrap().map().unwrap();
    mapped.as_mut_slice()[..8 * PAGE].fill(0xee);
    mapped.flush().unwrap();
    let all = PageRange { start: PageIndex::new(0), count: PageCount::new(SIZE / PAGE as u64) };
    other.over(RangeAction::Pin, all).unwrap();
    give_back(&mut mapped, 3..5);
    assert!(mapped.as_slice()[2 * PAGE..3 * PAGE].iter().all(|byte| *byte == 0xee));
    drop(mapped.unmap().unwrap());
    content[..3 * PAGE].fill(0xee);
    content[5 * PAGE..8 * PAGE].fill(0xee);
    let mut region = Region::open("file", options).unwrap();
    let mut found = vec![0; content.len()];
    region.read(0, &mut found).unwrap();
    assert!(found == content);
    assert_eq!(other.show().unwrap().pinned, all.count, "they stay pinned");
}

/// A region of another server, whose disk says that it is asked, and waits to be let go.
struct SlowDisk {
    asked: Sender<()>,
    let_go: Arc<Mutex<Receiver<()>>>,
}

impl DistantRegion for SlowDisk {
    fn identity(&self) -> (farmem_region::Incarnation, farmem_region::RegionId) {
        Default::default()
    }

    fn size(&mut self) -> io::Result<u64> {
        Ok(SIZE)
    }

    fn read(&mut self, bytes: Range<u64>) -> io::Result<Vec<u8>> {
        Ok(vec![7; (bytes.end - bytes.start) as usize])
    }

    fn write(&mut self, _at: u64, _bytes: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.asked.send(());
        // Also when the test has failed.
        let _ = self.let_go.lock().unwrap().recv();
        Ok(())
    }
}

/// Cap 15: whoever flushes the region waits for its disk, and nobody else: what is given back meanwhile is
/// forgotten before the disk has answered.
#[test]
fn cap_15_a_mapping_gives_back_while_a_disk_is_waited_for() {
    if !may_page() {
        return;
    }
    let (asked, is_asked) = channel();
    let (lets_go, let_go) = channel();
    let (asked, let_go) = (Mutex::new(asked), Arc::new(Mutex::new(let_go)));
    let server = TestServer::start_with(64, |config| {
        config.neighbours = Some(Neighbours::new(move |_, _, _: Use| {
            let (asked, let_go) = (asked.lock().unwrap().clone(), Arc::clone(&let_go));
            Ok(Box::new(SlowDisk { asked, let_go }))
        }));
    });
    // Goes before the server does, which waits for its disk.
    let lets_go: Sender<()> = lets_go;
    let options = server.options(0);
    let source =
        Source::Server { address: "other:1", region: "there", offset: 0, writes_back: true };
    let size = ByteCount::new(SIZE);
    let create = Create { name: "there", size, page_bytes: 4096, source, prefers: None };
    named::create(&options.server, &create, TIMEOUT).unwrap();
    let [mut flusher, mut other] =
        [(); 2].map(|()| NamedRegion::open(&options.server, "there", false, TIMEOUT).unwrap());
    let mut mapped = Region::open("there", options.clone()).unwrap().map().unwrap();
    mapped.as_mut_slice()[..8 * PAGE].fill(0xee);
    mapped.flush().unwrap();
    let flusher = std::thread::spawn(move || {
        let all = PageRange { start: PageIndex::new(0), count: PageCount::new(SIZE / PAGE as u64) };
        flusher.over(RangeAction::Flush, all)
    });
    is_asked.recv().unwrap();
    let before = other.show().unwrap().stored.get();
    give_back(&mut mapped, 3..5);
    let began = Instant::now();
    while other.show().unwrap().stored.get() > before - 2 {
        assert!(began.elapsed() < Duration::from_secs(3), "it waits for the disk");
    }
    assert!(!flusher.is_finished());
    lets_go.send(()).unwrap();
    flusher.join().unwrap().unwrap();
    drop(mapped.unmap().unwrap());
    let mut region = Region::open("there", options).unwrap();
    let mut found = vec![0; 8 * PAGE];
    region.read(0, &mut found).unwrap();
    let expected = [[0xee; 3 * PAGE].as_slice(), &[7; 2 * PAGE], &[0xee; 3 * PAGE]].concat();
    assert!(found == expected);
}
