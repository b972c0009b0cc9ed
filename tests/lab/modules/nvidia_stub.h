/* SPDX-License-Identifier: GPL-2.0 */
/* What the stub modules of the NVIDIA stack share. */
#ifndef NVIDIA_STUB_H
#define NVIDIA_STUB_H

#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/proc_fs.h>

#define NVS_MAJOR		195
#define NVS_MINOR_GPU_MAX	247
#define NVS_MINOR_MODESET	254
#define NVS_MINOR_CTL		255

/*
 * MODULE_VERSION of every module. It is padded so that tests/lab/run can
 * write another version over it in the finished file; the kernel skips the
 * zeros that are left.
 */
#define NVS_VERSION_PLACEHOLDER "LAB-DRIVER-VERSION"

#define NVS_OF_CLASS(c) PCI_DEVICE(PCI_VENDOR_ID_NVIDIA, PCI_ANY_ID), .class = (c) << 8, .class_mask = ~0

/* nvidia and nvidia_drm both say that they are for these: udev loads both when it sees a card. */
static const struct pci_device_id nvs_alias_ids[] __maybe_unused = {
	{ NVS_OF_CLASS(PCI_CLASS_DISPLAY_VGA) },
	{ NVS_OF_CLASS(PCI_CLASS_DISPLAY_3D) },
	{ NVS_OF_CLASS(PCI_CLASS_BRIDGE_OTHER) },
	{ }
};

struct nvs_gpu {
	struct list_head node;
	struct kref ref;
	struct pci_dev *pdev;
	struct proc_dir_entry *proc;
	struct mutex lock;	/* held while it is started: for the count, and who wants to change it */
	int minor;
	int usage;	/* open descriptors, mappings, attached nvidiactls, nvidia_drm's reference */
	bool removing;	/* remove has begun: no client may attach any more */
	bool unlinked;	/* nobody finds it any more */
};

/* One user inside the kernel that wants to know of every GPU: nvidia_drm. */
struct nvs_client {
	struct list_head node;
	void (*attach)(struct pci_dev *pdev);
	/* Called before remove waits for the usage count. */
	void (*detach)(struct pci_dev *pdev);
};

/* A symbol of another module, so that this one depends on it as the real one does. */
#define NVS_NEEDS(symbol)							\
	extern char symbol[];							\
	static char *const nvs_needs_##symbol __used = symbol

/* nvidia_main.c, for nvidia_proc.c */
void nvs_ask_resource_manager(void);

/* nvidia_main.c, for nvidia_modeset and nvidia_uvm */
const char *nvs_version(void);
bool nvs_version_from(unsigned int a, unsigned int b, unsigned int c);
void nvs_client_register(struct nvs_client *client);
void nvs_client_unregister(struct nvs_client *client);
int nvs_gpu_get(struct pci_dev *pdev);
void nvs_gpu_put(struct pci_dev *pdev);

/* nvidia_modeset.c, for nvidia_drm: as in the real stack it sits between */
bool nvkms_version_from(unsigned int a, unsigned int b, unsigned int c);
void nvkms_client_register(struct nvs_client *client);
void nvkms_client_unregister(struct nvs_client *client);
int nvkms_gpu_get(struct pci_dev *pdev);
void nvkms_gpu_put(struct pci_dev *pdev);

/* nvidia_proc.c */
int nvs_proc_init(void);
void nvs_proc_exit(void);
void nvs_proc_add(struct nvs_gpu *gpu);
void nvs_proc_remove(struct nvs_gpu *gpu);

#endif
