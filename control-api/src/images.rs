//! What the API asks of the catalog of images.
//!
//! A seam for tests: a real build takes a container build and a boot, and most of what the API says about images has
//! nothing to do with either.

use std::{collections::BTreeMap, path::PathBuf};

use async_trait::async_trait;
use image_builder::{BuildRequest, Catalog, CatalogError, ImageRecord};
use model::{ImageName, ImageVersion};

/// See the methods of the same names of [`Catalog`].
#[async_trait]
pub(crate) trait Images: Send + Sync + 'static {
    async fn create(&self, request: BuildRequest) -> Result<ImageRecord, CatalogError>;
    fn find(&self, name: &ImageName, version: ImageVersion) -> Option<ImageRecord>;
    fn versions(&self, name: &ImageName) -> Vec<ImageRecord>;
    fn list(&self) -> Vec<ImageRecord>;
    fn latest_active(&self, name: &ImageName) -> Option<(ImageRecord, PathBuf)>;
    fn snapshot_dir(&self, name: &ImageName, version: ImageVersion) -> PathBuf;
    fn tags(&self, name: &ImageName) -> Result<BTreeMap<String, String>, CatalogError>;
    async fn set_tags(&self, name: &ImageName, tags: BTreeMap<String, String>) -> Result<bool, CatalogError>;
    fn build_log(&self, name: &ImageName, version: ImageVersion) -> PathBuf;
}

#[async_trait]
impl Images for Catalog {
    async fn create(&self, request: BuildRequest) -> Result<ImageRecord, CatalogError> {
        Catalog::create(self, request).await
    }

    fn find(&self, name: &ImageName, version: ImageVersion) -> Option<ImageRecord> {
        self.get(name, version)
    }

    fn versions(&self, name: &ImageName) -> Vec<ImageRecord> {
        Catalog::versions(self, name)
    }

    fn list(&self) -> Vec<ImageRecord> {
        Catalog::list(self)
    }

    fn latest_active(&self, name: &ImageName) -> Option<(ImageRecord, PathBuf)> {
        Catalog::latest_active(self, name)
    }

    fn snapshot_dir(&self, name: &ImageName, version: ImageVersion) -> PathBuf {
        Catalog::snapshot_dir(self, name, version)
    }

    fn tags(&self, name: &ImageName) -> Result<BTreeMap<String, String>, CatalogError> {
        Catalog::tags(self, name)
    }

    async fn set_tags(&self, name: &ImageName, tags: BTreeMap<String, String>) -> Result<bool, CatalogError> {
        Catalog::set_tags(self, name, tags).await
    }

    fn build_log(&self, name: &ImageName, version: ImageVersion) -> PathBuf {
        Catalog::build_log(self, name, version)
    }
}
