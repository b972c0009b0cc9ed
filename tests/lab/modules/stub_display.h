/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A DRM device without hardware: one pipe, one connector, shadow memory.
 * Included by nvidia_drm.c and nouveau_main.c; fbcon runs on it for real.
 *
 * Nothing here is tied to the parent's driver by devm: the module may go
 * while the parent stays bound, and an open descriptor may outlive both.
 */
#ifndef STUB_DISPLAY_H
#define STUB_DISPLAY_H

#include <drm/drm_atomic_helper.h>
#include <drm/drm_connector.h>
#include <drm/drm_drv.h>
#include <drm/drm_edid.h>
#include <drm/drm_fbdev_shmem.h>
#include <drm/drm_fourcc.h>
#include <drm/drm_gem_framebuffer_helper.h>
#include <drm/drm_gem_shmem_helper.h>
#include <drm/drm_managed.h>
#include <drm/drm_modeset_helper_vtables.h>
#include <drm/drm_probe_helper.h>
#include <drm/drm_simple_kms_helper.h>
#include <linux/aperture.h>
#include <linux/pci.h>

struct stub_output {
	struct drm_simple_display_pipe pipe;
	struct drm_connector connector;
};

static int stub_get_modes(struct drm_connector *connector)
{
	int n = drm_add_modes_noedid(connector, 1024, 768);

	drm_set_preferred_mode(connector, 1024, 768);
	return n;
}

static const struct drm_connector_helper_funcs stub_connector_helper_funcs = {
	.get_modes = stub_get_modes,
};

static const struct drm_connector_funcs stub_connector_funcs = {
	.fill_modes		= drm_helper_probe_single_connector_modes,
	.destroy		= drm_connector_cleanup,
	.reset			= drm_atomic_helper_connector_reset,
	.atomic_duplicate_state	= drm_atomic_helper_connector_duplicate_state,
	.atomic_destroy_state	= drm_atomic_helper_connector_destroy_state,
};

static const struct drm_simple_display_pipe_funcs stub_pipe_funcs = { };

static const struct drm_mode_config_funcs stub_mode_config_funcs = {
	.fb_create	= drm_gem_fb_create_with_dirty,
	.atomic_check	= drm_atomic_helper_check,
	.atomic_commit	= drm_atomic_helper_commit,
};

static int stub_display_kms(struct drm_device *drm)
{
	static const u32 formats[] = { DRM_FORMAT_XRGB8888 };
	struct stub_output *out;
	int err;

	/* First, so that it is freed after the mode configuration. */
	out = drmm_kzalloc(drm, sizeof(*out), GFP_KERNEL);
	if (!out)
		return -ENOMEM;
	err = drmm_mode_config_init(drm);
	if (err)
		return err;
	drm->mode_config.max_width = 4096;
	drm->mode_config.max_height = 4096;
	drm->mode_config.preferred_depth = 24;
	drm->mode_config.funcs = &stub_mode_config_funcs;

	drm_connector_helper_add(&out->connector, &stub_connector_helper_funcs);
	err = drm_connector_init(drm, &out->connector, &stub_connector_funcs,
				 DRM_MODE_CONNECTOR_HDMIA);
	if (err)
		return err;
	err = drm_simple_display_pipe_init(drm, &out->pipe, &stub_pipe_funcs,
					   formats, ARRAY_SIZE(formats), NULL,
					   &out->connector);
	if (err)
		return err;
	drm_mode_config_reset(drm);
	return 0;
}

static struct drm_device *stub_display_create(const struct drm_driver *driver,
					      struct pci_dev *pdev,
					      bool modeset, bool fbdev)
{
	struct drm_device *drm = drm_dev_alloc(driver, &pdev->dev);
	int err = 0;

	if (IS_ERR(drm))
		return drm;
	/* Who brings a console of its own first takes away the firmware's. */
	if (modeset && fbdev)
		err = aperture_remove_conflicting_pci_devices(pdev, driver->name);
	if (!err && modeset)
		err = stub_display_kms(drm);
	else if (!err)
		drm->driver_features &= ~(DRIVER_MODESET | DRIVER_ATOMIC);
	if (!err)
		err = drm_dev_register(drm, 0);
	if (err) {
		drm_dev_put(drm);
		return ERR_PTR(err);
	}
	if (modeset && fbdev)
		drm_fbdev_shmem_setup(drm, 32);
	return drm;
}

static void stub_display_destroy(struct drm_device *drm)
{
	drm_dev_unplug(drm);
	if (drm_core_check_feature(drm, DRIVER_MODESET))
		drm_atomic_helper_shutdown(drm);
	drm_dev_put(drm);
}

#endif
