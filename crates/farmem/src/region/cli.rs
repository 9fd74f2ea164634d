//! The flags of `farmem region`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand};
use farmem_transport::ServerAddress;
use farmem_wire::Tier;

use crate::cli::OutputOptions;
use crate::size::Size;

/// `farmem region`.
#[derive(Debug, Subcommand)]
pub(crate) enum RegionCommand {
    /// Make a region, which costs nothing until it is written
    Create(CreateOptions),
    /// List the regions of a server
    List(ListOptions),
    /// Show one region: how much of it is written, and where that lies
    Show(ShowOptions),
    /// Make a region larger or smaller
    Resize(ResizeOptions),
    /// Say in which tier a region, or a range of it, is to be kept
    Prefer(PreferOptions),
    /// Delete a region with all that it holds
    Delete(DeleteOptions),
    /// Make a writable virtual copy, at once and however large the region is
    Clone(CloneOptions),
    /// Make a virtual copy that never changes
    Snapshot(SnapshotOptions),
    /// Fill a range, bring it into memory and keep it there
    Pin(RangeOptions),
    /// Let a range leave memory again
    Unpin(RangeOptions),
    /// Fill a range and bring it into memory
    Prefetch(PrefetchOptions),
    /// Fill what was never written of a range
    Initialise(RangeOptions),
    /// Forget what was written to a range
    Invalidate(RangeOptions),
    /// Write what changed to the region's file, and wait until the disk has it
    Flush(RangeOptions),
    /// Back a region up to a directory of the server's machine, as it is at this instant
    Backup(BackupOptions),
    /// Make a region from a backup
    Restore(RestoreOptions),
    /// Copy a region, as it is at this instant, or a part of it, here or to another server
    Copy(CopyOptions),
    /// Write a range of a region to standard output
    Read(RangeOptions),
    /// Write standard input to a region
    Write(WriteOptions),
}

/// Which server.
#[derive(Debug, Args)]
pub(crate) struct ServerOption {
    /// The memory server: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070", env = "FARMEM_SERVER")]
    pub(crate) server: String,
}

/// `farmem region create`.
#[derive(Debug, Args)]
pub(crate) struct CreateOptions {
    /// Its name
    pub(crate) name: String,
    /// Its size [default with --file: the rest of the file, if the server is on this machine and that is
    /// whole pages]
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Option<Size>,
    /// The unit in which it is filled, found changed and written back: 512, 1K, 4K, 64K or 2M
    #[arg(long, value_name = "SIZE", default_value = "4K")]
    pub(crate) page_size: Size,
    /// The byte that it holds where it was never written
    #[arg(long, value_name = "BYTE", default_value = "0", conflicts_with = "file")]
    pub(crate) fill: u8,
    /// The file that it holds, in a directory that the server allows, or a region of another memory
    /// server, as server:ADDR/REGION; what changes is flushed there
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// The region of another memory server that it holds at first, as server:ADDR/REGION: each page is
    /// fetched when it is first touched
    #[arg(long, value_name = "REGION", conflicts_with_all = ["file", "fill"])]
    pub(crate) from: Option<Distant>,
    /// Where in the file, or in the other region, it begins
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub(crate) offset: Size,
    /// The tier in which it is to be kept: dram, compressed or file [default: where its use puts it]
    #[arg(long, value_name = "TIER", value_parser = tier)]
    pub(crate) tier_preference: Option<Tier>,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region list`.
#[derive(Debug, Args)]
pub(crate) struct ListOptions {
    #[command(flatten)]
    pub(crate) server: ServerOption,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

/// `farmem region show`.
#[derive(Debug, Args)]
pub(crate) struct ShowOptions {
    /// The region
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) server: ServerOption,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

/// `farmem region resize`.
#[derive(Debug, Args)]
pub(crate) struct ResizeOptions {
    /// The region
    pub(crate) name: String,
    /// Its new size
    pub(crate) size: Size,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region prefer`.
#[derive(Debug, Args)]
pub(crate) struct PreferOptions {
    /// The region
    pub(crate) name: String,
    /// dram, compressed or file; none: where its use puts it
    #[arg(value_name = "TIER", value_parser = tier_or_none)]
    pub(crate) tier: TierOrNone,
    /// The range, as OFFSET:LENGTH [default: all of it]
    #[arg(long, value_name = "RANGE")]
    pub(crate) range: Option<ByteRange>,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region delete`.
#[derive(Debug, Args)]
pub(crate) struct DeleteOptions {
    /// The region
    pub(crate) name: String,
    /// Delete it though it was copied: the copies keep what they share with it
    #[arg(long)]
    pub(crate) keep_copies: bool,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region clone`.
#[derive(Debug, Args)]
pub(crate) struct CloneOptions {
    /// The region
    pub(crate) name: String,
    /// The copy's name
    pub(crate) copy: String,
    /// Let the copy have its own of what is read too, not only of what is written
    #[arg(long)]
    pub(crate) on_access: bool,
    /// Where its own range of the file begins, to which it is written back; what it holds goes there with
    /// its first flush
    #[arg(long, value_name = "SIZE")]
    pub(crate) file_offset: Option<Size>,
    /// The file in which that range is, in a directory that the server allows [default: that of the
    /// region]
    #[arg(long, value_name = "FILE", requires = "file_offset")]
    pub(crate) file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region snapshot`.
#[derive(Debug, Args)]
pub(crate) struct SnapshotOptions {
    /// The region
    pub(crate) name: String,
    /// The snapshot's name
    pub(crate) copy: String,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region backup`.
#[derive(Debug, Args)]
pub(crate) struct BackupOptions {
    /// The region
    pub(crate) name: String,
    /// The directory, in one that the server allows; it is made if there is none
    pub(crate) directory: PathBuf,
    /// Write everything anew, not only what has changed since the backup that is there
    #[arg(long)]
    pub(crate) full: bool,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region restore`.
#[derive(Debug, Args)]
pub(crate) struct RestoreOptions {
    /// The directory of the backup
    pub(crate) directory: PathBuf,
    /// The region's name
    pub(crate) name: String,
    /// Take the place of a region that has the name
    #[arg(long)]
    pub(crate) replace: bool,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region copy`.
#[derive(Debug, Args)]
pub(crate) struct CopyOptions {
    /// The region
    pub(crate) name: String,
    /// The region to copy to, which is made if there is none
    pub(crate) to: String,
    /// The range, as OFFSET:LENGTH [default: all of it]
    #[arg(long, value_name = "RANGE")]
    pub(crate) range: Option<ByteRange>,
    /// Where it begins in the other region [default: where it does in this one]
    #[arg(long, value_name = "SIZE")]
    pub(crate) to_offset: Option<Size>,
    /// The server of the other region [default: the same]
    #[arg(long, value_name = "ADDR")]
    pub(crate) to_server: Option<String>,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// A range of a region.
#[derive(Debug, Args)]
pub(crate) struct RangeOptions {
    /// The region
    pub(crate) name: String,
    /// The range, as OFFSET:LENGTH [default: all of it]
    #[arg(long, value_name = "RANGE")]
    pub(crate) range: Option<ByteRange>,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region prefetch`.
#[derive(Debug, Args)]
pub(crate) struct PrefetchOptions {
    /// What was read first the last time, in that order, as far as memory has room
    #[arg(long, conflicts_with = "range")]
    pub(crate) working_set: bool,
    #[command(flatten)]
    pub(crate) range: RangeOptions,
}

/// `farmem region write`.
#[derive(Debug, Args)]
pub(crate) struct WriteOptions {
    /// The region
    pub(crate) name: String,
    /// Where to begin
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub(crate) offset: Size,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// A tier, or none. A type of its own, as an `Option` would mean that it need not be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TierOrNone(pub(crate) Option<Tier>);

fn tier(text: &str) -> Result<Tier, String> {
    let found = Tier::ALL.into_iter().find(|tier| tier.name() == text);
    found.ok_or_else(|| format!("there is no tier {text}: say dram, compressed or file"))
}

fn tier_or_none(text: &str) -> Result<TierOrNone, String> {
    match text {
        "none" => Ok(TierOrNone(None)),
        other => tier(other).map(|tier| TierOrNone(Some(tier))),
    }
}

/// A region of another memory server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Distant {
    pub(crate) address: String,
    pub(crate) region: String,
}

impl Distant {
    const PREFIX: &str = "server:";

    /// Whether a text is meant as one.
    pub(crate) fn is_meant(text: &str) -> bool {
        text.starts_with(Self::PREFIX)
    }
}

impl FromStr for Distant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text} is not server:ADDR/REGION");
        let rest = text.strip_prefix(Self::PREFIX).ok_or_else(wrong)?;
        // A path has slashes of its own; then the region's name has none.
        let parts =
            if rest.starts_with("unix:") { rest.rsplit_once('/') } else { rest.split_once('/') };
        let (address, region) = parts.ok_or_else(wrong)?;
        if region.is_empty() {
            return Err(wrong());
        }
        let _: ServerAddress = address.parse().map_err(|error| format!("{}: {error}", wrong()))?;
        Ok(Self { address: address.to_owned(), region: region.to_owned() })
    }
}

/// Bytes of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ByteRange {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl FromStr for ByteRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (offset, length) = text.split_once(':').ok_or("a range is OFFSET:LENGTH")?;
        let size = |text: &str| text.parse::<Size>().map_err(|error| error.to_string());
        let (Size(offset), Size(length)) = (size(offset)?, size(length)?);
        offset.checked_add(length).ok_or("the range ends beyond 16 EiB")?;
        Ok(Self { offset, length })
    }
}
