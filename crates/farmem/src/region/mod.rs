//! `farmem region`: named regions of one memory server.

pub(crate) mod cli;
mod copy;
mod interrupts;

use std::io::{self, Read};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use farmem_region::{ByteCount, PAGE_SIZE, PageCount, PageIndex, PageRange};
use farmem_remote::named::{self, NamedRegion, RangeAction};
use farmem_transport::{Endpoint, ServerAddress};
use farmem_wire::{Create, FileRange, RegionInfo, Source, Tier};
use serde_json::{Value, json};

use self::cli::{
    BackupOptions, ByteRange, CloneOptions, CreateOptions, DeleteOptions, Distant, ListOptions,
    PreferOptions, PrefetchOptions, RangeOptions, RegionCommand, ResizeOptions, RestoreOptions,
    ServerOption, ShowOptions, SnapshotOptions, WriteOptions,
};
use crate::cli::OutputForm;
use crate::size::Size;
use crate::{standard_error, standard_output, table};

/// The longest that one request takes: a server that reads or writes 64 MiB on a slow disk.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The longest that a backup or a restore takes.
const LONG_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// Bytes that are read or written before the next ones: 4 MiB.
const STEP: usize = 4 << 20;

/// Does what the command says.
pub(crate) fn run(command: &RegionCommand) -> anyhow::Result<ExitCode> {
    match command {
        RegionCommand::Create(options) => create(options)?,
        RegionCommand::List(options) => list(options)?,
        RegionCommand::Show(options) => show(options)?,
        RegionCommand::Resize(ResizeOptions { name, size, server }) => {
            open(name, server, true)?.resize(ByteCount::new(size.0))?;
        }
        RegionCommand::Prefer(options) => prefer(options)?,
        RegionCommand::Delete(DeleteOptions { name, keep_copies, server }) => {
            open(name, server, true)?.delete(*keep_copies)?;
        }
        RegionCommand::Clone(options) => clone(options)?,
        RegionCommand::Snapshot(SnapshotOptions { name, copy, server }) => {
            open(name, server, false)?.copy(copy, true, false)?;
        }
        RegionCommand::Pin(options) => over(options, RangeAction::Pin)?,
        RegionCommand::Unpin(options) => over(options, RangeAction::Unpin)?,
        RegionCommand::Prefetch(options) => prefetch(options)?,
        RegionCommand::Initialise(options) => over(options, RangeAction::Initialise)?,
        RegionCommand::Invalidate(options) => over(options, RangeAction::Invalidate)?,
        RegionCommand::Flush(options) => over(options, RangeAction::Flush)?,
        RegionCommand::Backup(options) => back_up(options)?,
        RegionCommand::Restore(options) => restore(options)?,
        RegionCommand::Copy(options) => copy::copy(options)?,
        RegionCommand::Read(options) => read(options)?,
        RegionCommand::Write(options) => write(options)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn prefetch(options: &PrefetchOptions) -> anyhow::Result<()> {
    let RangeOptions { name, server, .. } = &options.range;
    if !options.working_set {
        return over(&options.range, RangeAction::Prefetch);
    }
    let region = NamedRegion::open(&endpoint(server)?, name, false, LONG_TIMEOUT);
    let mut region = region.with_context(|| format!("region {name}"))?;
    let moved = region.prefetch_working_set()?;
    tell("brought in", PageCount::new(moved));
    Ok(())
}

/// Tells how much was done, by now: who does not take the note has it done all the same.
fn tell(done: &str, pages: PageCount) {
    standard_error::tell(format_args!("{} {done}", Size(pages.bytes().get())));
}

fn endpoint(server: &ServerOption) -> anyhow::Result<Endpoint> {
    let address: ServerAddress = server.server.parse()?;
    address.resolve().with_context(|| format!("cannot resolve {address}"))
}

fn open(name: &str, server: &ServerOption, take_over: bool) -> anyhow::Result<NamedRegion> {
    let endpoint = endpoint(server)?;
    NamedRegion::open(&endpoint, name, take_over, TIMEOUT).with_context(|| format!("region {name}"))
}

fn create(options: &CreateOptions) -> anyhow::Result<()> {
    let CreateOptions { name, page_size: Size(page_bytes), offset, server, .. } = options;
    let endpoint = endpoint(server)?;
    let made_of = made_of(options, &endpoint)?;
    let unit = (*page_bytes).max(PAGE_SIZE as u64);
    let size = match (&options.size, &made_of) {
        (Some(Size(size)), _) => *size,
        (None, MadeOf::File(path)) => {
            let length = length_of(path, &endpoint)?;
            rest(length, offset.0, unit).with_context(|| format!("--file {path}"))?
        }
        (None, MadeOf::Distant(Distant { address, region }, _)) => {
            let other = ServerOption { server: address.clone() };
            let length = open(region, &other, false)?.size().get();
            rest(length, offset.0, unit).with_context(|| format!("region {region} of {address}"))?
        }
        (None, MadeOf::Fill) => bail!("say how large the region is to be, by --size"),
    };
    let source = match &made_of {
        MadeOf::File(path) => Source::File { path, offset: offset.0 },
        MadeOf::Distant(Distant { address, region }, writes_back) => {
            let (offset, writes_back) = (offset.0, *writes_back);
            Source::Server { address, region, offset, writes_back }
        }
        MadeOf::Fill => Source::Fill(options.fill),
    };
    let page_bytes = u32::try_from(*page_bytes).unwrap_or(u32::MAX);
    let (size, prefers) = (ByteCount::new(size), options.tier_preference);
    let create = Create { name, size, page_bytes, source, prefers };
    named::create(&endpoint, &create, TIMEOUT)?;
    Ok(())
}

/// What is left of a file or region from an offset on, which must be whole pages: nothing of it is left off
/// unless somebody says so.
fn rest(length: u64, offset: u64, unit: u64) -> anyhow::Result<u64> {
    let rest = length.saturating_sub(offset);
    let odd = rest % unit;
    if rest == 0 {
        bail!("it has {length} bytes, and nothing from byte {offset} on");
    }
    if odd > 0 {
        bail!(
            "{rest} bytes from byte {offset} on are no multiple of {}, and a region is: give --size {}, which \
             leaves off the last {odd} bytes, or make it {} bytes longer",
            Size(unit),
            rest - odd,
            unit - odd
        );
    }
    Ok(rest)
}

/// The length of a file of the server, which can be told here if the server is here.
fn length_of(path: &str, server: &Endpoint) -> anyhow::Result<u64> {
    const SAY: &str = "say how large the region is to be, by --size";
    if !is_here(server) {
        bail!("--file {path} is on the machine of {server}: {SAY}");
    }
    let about = std::fs::metadata(path);
    Ok(about.with_context(|| format!("cannot look at {path}; {SAY}"))?.len())
}

/// Whether files have the same names for the server as for us, as far as its address tells.
fn is_here(server: &Endpoint) -> bool {
    match server {
        Endpoint::Unix(_) => true,
        Endpoint::Tcp(address) => address.ip().is_loopback(),
    }
}

/// What a region is made of.
enum MadeOf {
    Fill,
    /// A file, as the server finds it.
    File(String),
    /// A region of another server, and whether what changes is flushed there.
    Distant(Distant, bool),
}

fn made_of(options: &CreateOptions, server: &Endpoint) -> anyhow::Result<MadeOf> {
    if let Some(from) = &options.from {
        return Ok(MadeOf::Distant(from.clone(), false));
    }
    let Some(file) = &options.file else {
        if options.offset.0 != 0 {
            bail!("--offset is of a --file or --from");
        }
        return Ok(MadeOf::Fill);
    };
    match file.to_str().filter(|text| Distant::is_meant(text)) {
        Some(text) => {
            let distant = text.parse().map_err(|error| anyhow!("--file {error}"))?;
            Ok(MadeOf::Distant(distant, true))
        }
        None => Ok(MadeOf::File(file_at(file, server)?)),
    }
}

fn clone(options: &CloneOptions) -> anyhow::Result<()> {
    let CloneOptions { name, copy, on_access, file_offset, file, server } = options;
    let mut region = open(name, server, false)?;
    let Some(Size(offset)) = *file_offset else {
        region.copy(copy, false, *on_access)?;
        return Ok(());
    };
    let RegionInfo { is_file, is_server, page_bytes, .. } = region.show()?;
    if !is_file && !is_server {
        bail!("region {name} is made from no file: a clone of it has no range of one");
    }
    if !offset.is_multiple_of(page_bytes.into()) {
        let page = Size(page_bytes.into());
        bail!("--file-offset must be a multiple of the region's page size, {page}");
    }
    let endpoint = endpoint(server)?;
    let path = file.as_deref().map(|file| file_at(file, &endpoint)).transpose()?;
    if path.is_none() && !is_file {
        bail!(
            "region {name} is made from another server's region: say in which --file the range is"
        );
    }
    let path = path.as_deref().unwrap_or_default();
    region.copy_with_range(copy, *on_access, FileRange { path, offset })?;
    Ok(())
}

fn prefer(options: &PreferOptions) -> anyhow::Result<()> {
    let mut region = open(&options.name, &options.server, false)?;
    let range = pages_of(options.range, &region)?;
    region.prefer(options.tier.0, range)?;
    Ok(())
}

fn back_up(options: &BackupOptions) -> anyhow::Result<()> {
    let endpoint = endpoint(&options.server)?;
    let region = NamedRegion::open(&endpoint, &options.name, false, LONG_TIMEOUT);
    let mut region = region.with_context(|| format!("region {}", options.name))?;
    let path = place(&options.directory)?;
    let written = region.back_up(&path, options.full).with_context(|| format!("backup {path}"))?;
    tell("written", PageCount::new(written));
    Ok(())
}

fn restore(options: &RestoreOptions) -> anyhow::Result<()> {
    let (endpoint, path) = (endpoint(&options.server)?, place(&options.directory)?);
    let restored = named::restore(&endpoint, &path, &options.name, options.replace, LONG_TIMEOUT);
    let info = restored.with_context(|| format!("backup {path}"))?;
    tell("restored", info.stored);
    Ok(())
}

/// A directory, which need not be there, as the server finds it, wherever that was started.
fn place(path: &Path) -> anyhow::Result<String> {
    let name = path.file_name().with_context(|| format!("{} has no name", path.display()))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    // On another machine it may be another one: then the path is taken as it is.
    let parent = parent.canonicalize().unwrap_or_else(|_| parent.to_owned());
    let path = parent.join(name);
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.to_owned())
}

/// A file as the server finds it, wherever that was started: it need not be there for us.
fn file_at(path: &Path, server: &Endpoint) -> anyhow::Result<String> {
    let real = if is_here(server) { path.canonicalize().ok() } else { None };
    let Some(real) = real.or_else(|| path.is_absolute().then(|| path.to_owned())) else {
        return place(path);
    };
    let text = real.to_str().with_context(|| format!("{} is not UTF-8", real.display()))?;
    Ok(text.to_owned())
}

fn list(options: &ListOptions) -> anyhow::Result<()> {
    let regions = named::list(&endpoint(&options.server)?, TIMEOUT)?;
    match options.output.form() {
        OutputForm::Json => {
            let regions: Vec<Value> = regions.iter().map(in_json).collect();
            standard_output::write_json(&regions)?;
        }
        OutputForm::Table => {
            let row = |info: &RegionInfo| {
                let size = |pages: PageCount| Size(pages.bytes().get()).to_string();
                let page = Size(u64::from(info.page_bytes)).to_string();
                [
                    info.name.clone(),
                    size(info.pages),
                    size(info.stored),
                    page,
                    kind(info).to_owned(),
                ]
            };
            let rows: Vec<_> = regions.iter().map(row).collect();
            let heading = ["NAME", "SIZE", "WRITTEN", "PAGE", "KIND"];
            standard_output::write(table::lay_out(heading, &rows))?;
        }
    }
    Ok(())
}

const fn kind(info: &RegionInfo) -> &'static str {
    match (info.is_frozen, info.is_file, info.is_server) {
        (true, ..) => "snapshot",
        (false, true, _) => "file",
        (false, false, true) => "server",
        (false, false, false) => "memory",
    }
}

fn show(options: &ShowOptions) -> anyhow::Result<()> {
    let info = open(&options.name, &options.server, false)?.show()?;
    match options.output.form() {
        OutputForm::Json => standard_output::write_json(&in_json(&info))?,
        OutputForm::Table => {
            let size = |pages: PageCount| Size(pages.bytes().get()).to_string();
            let rows = [
                ["name", &info.name],
                ["kind", kind(&info)],
                ["size", &size(info.pages)],
                ["page size", &Size(u64::from(info.page_bytes)).to_string()],
                ["written", &size(info.stored)],
                ["since the last copy", &size(info.changed)],
                ["dirty", &size(info.dirty)],
                ["pinned", &size(info.pinned)],
                ["in dram", &size(info.dram)],
                ["compressed", &size(info.compressed)],
                ["in the file tier", &size(info.file)],
            ];
            let mut rows = rows.map(|row| row.map(str::to_owned)).to_vec();
            if !info.source.is_empty() {
                rows.insert(2, ["made from".to_owned(), info.source.clone()]);
            }
            if info.is_unfilled {
                let what = "does not hold yet what was inherited: flush it".to_owned();
                rows.insert(3, ["its own range".to_owned(), what]);
            }
            for (tier, pages) in Tier::ALL.into_iter().zip(info.preferred) {
                if pages.get() > 0 {
                    rows.push([format!("prefers {}", tier.name()), size(pages)]);
                }
            }
            standard_output::write(table::lay_out(["WHAT", "VALUE"], &rows))?;
        }
    }
    Ok(())
}

fn in_json(info: &RegionInfo) -> Value {
    json!({
        "name": info.name,
        "kind": kind(info),
        "size_bytes": info.pages.bytes().get(),
        "page_bytes": info.page_bytes,
        "stored_bytes": info.stored.bytes().get(),
        "changed_bytes": info.changed.bytes().get(),
        "is_unfilled": info.is_unfilled,
        "dirty_bytes": info.dirty.bytes().get(),
        "pinned_bytes": info.pinned.bytes().get(),
        "dram_bytes": info.dram.bytes().get(),
        "compressed_bytes": info.compressed.bytes().get(),
        "file_bytes": info.file.bytes().get(),
        "source": info.source,
        "tier_preference": preference(info),
        "prefers_dram_bytes": info.preferred[0].bytes().get(),
        "prefers_compressed_bytes": info.preferred[1].bytes().get(),
        "prefers_file_bytes": info.preferred[2].bytes().get(),
    })
}

/// The tier that all of a region is to be kept in; "mixed" if ranges differ.
fn preference(info: &RegionInfo) -> &'static str {
    let whole = Tier::ALL.into_iter().zip(info.preferred).find(|(_, pages)| *pages == info.pages);
    match whole {
        Some((tier, _)) => tier.name(),
        None if info.preferred.iter().all(|pages| pages.get() == 0) => "none",
        None => "mixed",
    }
}

fn over(options: &RangeOptions, action: RangeAction) -> anyhow::Result<()> {
    let is_change = action == RangeAction::Invalidate;
    let mut region = open(&options.name, &options.server, is_change)?;
    let range = pages_of(options.range, &region)?;
    let changed = region.over(action, range)?;
    tell("changed", PageCount::new(changed));
    Ok(())
}

fn bytes_of(range: Option<ByteRange>, region: &NamedRegion) -> ByteRange {
    range.unwrap_or(ByteRange { offset: 0, length: region.size().get() })
}

fn pages_of(range: Option<ByteRange>, region: &NamedRegion) -> anyhow::Result<PageRange> {
    let ByteRange { offset, length } = bytes_of(range, region);
    let page = PAGE_SIZE as u64;
    if !offset.is_multiple_of(page) || !length.is_multiple_of(page) {
        bail!("offset and length must be multiples of 4 KiB");
    }
    Ok(PageRange { start: PageIndex::new(offset / page), count: PageCount::new(length / page) })
}

fn read(options: &RangeOptions) -> anyhow::Result<()> {
    let mut region = open(&options.name, &options.server, false)?;
    let ByteRange { offset, length } = bytes_of(options.range, &region);
    let end = offset + length;
    for start in (offset..end).step_by(STEP) {
        let bytes = region.read(start..end.min(start + STEP as u64))?;
        standard_output::write(&bytes)?;
    }
    Ok(())
}

fn write(options: &WriteOptions) -> anyhow::Result<()> {
    let mut region = open(&options.name, &options.server, true)?;
    let mut input = io::stdin().lock();
    let (mut at, mut bytes) = (options.offset.0, Vec::new());
    loop {
        bytes.clear();
        let mut step = (&mut input).take(STEP as u64);
        step.read_to_end(&mut bytes).context("cannot read standard input")?;
        if bytes.is_empty() {
            return Ok(());
        }
        region.write(at, &bytes)?;
        at += bytes.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_all_of_what_is_left_or_none() {
        assert_eq!(rest(12_288, 4096, 4096).unwrap(), 8192);
        let odd = rest(10_000, 0, 4096).unwrap_err().to_string();
        for part in ["4 KiB", "--size 8192", "last 1808 bytes", "2288 bytes longer"] {
            assert!(odd.contains(part), "{odd}");
        }
        assert!(rest(4096, 4096, 4096).is_err());
        assert!(rest(4096, 1 << 40, 4096).is_err());
    }

    #[test]
    fn a_file_of_the_server_need_not_be_here() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap();
        std::fs::write(real.join("file"), [0; 4096]).unwrap();
        std::os::unix::fs::symlink("file", real.join("link")).unwrap();
        let (link, absent) = (real.join("link"), real.join("absent"));
        let here = Endpoint::Unix(real.join("s"));
        let there = Endpoint::Tcp("192.0.2.9:7070".parse().unwrap());
        assert_eq!(file_at(&link, &here).unwrap(), real.join("file").to_str().unwrap());
        // What is a link here may be none there.
        assert_eq!(file_at(&link, &there).unwrap(), link.to_str().unwrap());
        for server in [&here, &there] {
            assert_eq!(file_at(&absent, server).unwrap(), absent.to_str().unwrap());
        }
        let file = real.join("file");
        let file = file.to_str().unwrap();
        assert_eq!(length_of(file, &here).unwrap(), 4096);
        for (path, server) in [(file, &there), (absent.to_str().unwrap(), &here)] {
            let unknown = format!("{:#}", length_of(path, server).unwrap_err());
            assert!(unknown.contains(path) && unknown.contains("--size"), "{unknown}");
        }
    }
}
